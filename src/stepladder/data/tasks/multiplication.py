"""Products of two numbers."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import carry, number, numeral, sorted_operands, text


@task("multiplication")
class Multiplication(Task):
    """The product of two natural numbers.

    ``12*345=`` -> ``4140``

    Size is the number of digits of the longer operand; the other has any number of digits up to that, uniformly.
    ``a*b`` and ``b*a`` are one question. Source: Dziri et al. 2023, "Faith and fate". Differs from it in: operands of
    unequal length.
    """

    axis: ClassVar[str] = "digits"
    alphabet: ClassVar[str] = "0123456789*="
    largest: ClassVar[int] = 64
    growth: ClassVar[tuple[float, ...]] = (1.25, 1.5, 2)

    train: Range = (1, 3)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        width = int(size.max())
        shorter = 1 + dice.below(size)
        swap = dice.below(2) == 1
        a = number(dice, np.where(swap, shorter, size), width)
        b = number(dice, np.where(swap, size, shorter), width)
        product = np.zeros((len(size), 2 * width), np.int64)
        for column in range(width):  # long multiplication, all carries at the end
            product[:, column : column + width] += a[:, column, None] * b
        question = text(numeral(a), "*", numeral(b), "=")
        return Examples(question, text(numeral(carry(product))), size)

    def canonical(self, examples: Examples) -> np.ndarray:
        return sorted_operands(examples.question, "*")

    def solve(self, question: str) -> str:
        a, b = question.rstrip("=").split("*")
        return str(int(a) * int(b))

    def chance(self, size: int) -> float:
        return 1 / ((10**size - 1) ** 2 + 1)

    def max_answer(self, size: int) -> int:
        return 2 * size
