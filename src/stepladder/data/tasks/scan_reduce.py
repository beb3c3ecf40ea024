"""One number out of many."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from operator import xor
from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, task
from stepladder.data.programs import ArrayProgram, array
from stepladder.data.symbols import decimals, joined, text

_OPERATIONS = np.array([list(name.encode().ljust(3, b"\0")) for name in ("sum", "max", "min", "xor")], np.uint8)


@task("scan_reduce")
class ScanReduce(ArrayProgram):
    """The sum, maximum, minimum or exclusive or of an array.

    ``op=sum; arr=3,-1,4=`` -> ``6``, ``op=xor; arr=6,-1=`` -> ``-7``

    Size is the length of the array. Exclusive or is that of two's complement of unbounded width. Source: "scan_reduce"
    of VecTur's CompGen. Differs from it in: nothing.
    """

    complexity: ClassVar[str] = "O(n) time, O(1) space"
    alphabet: ClassVar[str] = "0123456789-,;= oparsumxin"

    train: Range = (4, 16)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        numbers, filled = self.numbers(dice, size)
        operation = dice.below(4)
        most = np.where(filled, numbers, self.low).max(axis=1)
        least = np.where(filled, numbers, self.high).min(axis=1)
        values = [numbers.sum(axis=1), most, least, np.bitwise_xor.reduce(numbers, axis=1)]
        question = text("op=", _OPERATIONS[operation], "; arr=", joined(numbers, filled), "=")
        return Examples(question, text(decimals(np.choose(operation, values)[:, None])[:, 0]), size)

    def solve(self, question: str) -> str:
        operation, numbers = question.removesuffix("=").split("; ")
        of: dict[str, Callable[[list[int]], int]] = {"sum": sum, "max": max, "min": min, "xor": partial(reduce, xor)}
        return str(of[operation.removeprefix("op=")](array(numbers)))

    def chance(self, size: int) -> float:
        bits = max(self.low.bit_length(), self.high.bit_length())
        values = {*range(self.low, self.high + 1), *range(-(2**bits), 2**bits)}
        return 1 / len(values.union(range(size * self.low, size * self.high + 1)))

    def max_answer(self, size: int) -> int:
        return max(self.digits(size), self.digits())
