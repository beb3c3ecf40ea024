"""Sums of two numbers of any length."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.core.config import Field
from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import add, number, numeral, sorted_operands, text


@task("addition")
class Addition(Task):
    """The sum of two natural numbers.

    ``958+47=`` -> ``1005``; with ``reversed`` -> ``5001``

    Size is the number of digits of the longer operand; the other has any number of digits up to that, uniformly. In
    half of the items a run of columns adds up to 9, so that a carry from below, which is there or not about equally
    often, goes through all of it: with uniform digits long carries hardly occur, and looking two columns back is
    enough. ``a+b`` and ``b+a`` are one question. Source: Lee et al. 2023, "Teaching arithmetic to small
    transformers" (``reversed`` is theirs). Differs from it in: the runs; operands of unequal length, unpadded.
    """

    axis: ClassVar[str] = "digits"
    alphabet: ClassVar[str] = "0123456789+="

    train: Range = (1, 4)
    reversed: bool = Field(False, description="write the answer from its least significant digit")

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        width = int(size.max())
        shorter = 1 + dice.below(size)
        swap = dice.below(2) == 1
        a = number(dice, np.where(swap, shorter, size), width)
        b = number(dice, np.where(swap, size, shorter), width)
        low, run = dice.below(shorter), dice.below(2) == 1
        column = np.arange(width)
        # from one above `low` to one below the leading digit, which must not become 0
        nines = run[:, None] & (column > low[:, None]) & (column < shorter[:, None] - 1)
        b = np.where(nines, 9 - a, b)
        answer = numeral(add(a, b))
        if self.reversed:
            answer = answer[:, ::-1]
        return Examples(text(numeral(a), "+", numeral(b), "="), text(answer), size)

    def canonical(self, examples: Examples) -> np.ndarray:
        return sorted_operands(examples.question, "+")

    def solve(self, question: str) -> str:
        a, b = question.rstrip("=").split("+")
        answer = str(int(a) + int(b))
        return answer[::-1] if self.reversed else answer

    def chance(self, size: int) -> float:
        least = 10 ** (size - 1) if size > 1 else 0
        return 1 / (2 * (10**size - 1) - least + 1)

    def max_answer(self, size: int) -> int:
        return size + 1
