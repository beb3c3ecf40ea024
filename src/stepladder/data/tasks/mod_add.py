"""Sums that wrap around."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import digits_of, numeral, sorted_operands, text


@task("mod_add")
class ModAdd(Task):
    """The sum of two numbers below a modulus, modulo it.

    ``47+85%97=`` -> ``35``

    Size is the modulus itself, which the question shows; about half of the sums wrap. ``a+b`` and ``b+a`` are one
    question. ``train=[97, 97]`` is the classic of grokking: one table, learned from three quarters of its cells.
    Source: Power et al. 2022, "Grokking". Differs from it in: any modulus of a range, written in decimal digits.
    """

    axis: ClassVar[str] = "moduli"
    alphabet: ClassVar[str] = "0123456789+%="
    smallest: ClassVar[int] = 2
    largest: ClassVar[int] = 10**6

    train: Range = (17, 997)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        a, b = dice.below(size), dice.below(size)
        operands = (numeral(digits_of(a)), "+", numeral(digits_of(b)), "%", numeral(digits_of(size)))
        return Examples(text(*operands, "="), text(numeral(digits_of((a + b) % size))), size)

    def canonical(self, examples: Examples) -> np.ndarray:
        return sorted_operands(examples.question, "+", end="%")

    def solve(self, question: str) -> str:
        total, modulus = question.rstrip("=").split("%")
        a, b = total.split("+")
        return str((int(a) + int(b)) % int(modulus))

    def chance(self, size: int) -> float:
        return 1 / size

    def max_answer(self, size: int) -> int:
        return len(str(size - 1))
