"""Is this the product?"""

from __future__ import annotations

from math import isqrt
from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, task
from stepladder.data.programs import Program
from stepladder.data.symbols import decimals, text


@task("freivalds")
class Freivalds(Program):
    """Whether the product of two square matrices is a third one: y or n.

    ``a=1,2/3,4; b=0,1/1,1; c=2,3/4,7; equal=`` -> ``y``, ``a=2; b=3; c=7; equal=`` -> ``n``

    Size is the number of rows; the entries of a and b are digits. In half of the items one entry of c is wrong, by 1 to
    9. A fixed algorithm multiplies; with random numbers one can do with less: (a b) r = c r for a random vector r of
    zeros and ones is wrong at most half of the time. Source: Freivalds 1977; of VecTur's randomised suite. Differs
    from it in: the claim is a b = c.
    """

    complexity: ClassVar[str] = "O(n^2) time with random numbers, O(n^3) without; O(n) space"
    axis: ClassVar[str] = "rows"
    alphabet: ClassVar[str] = "0123456789,/;= abcequlyn"
    largest: ClassVar[int] = 16
    growth: ClassVar[tuple[float, ...]] = (1.25, 1.5, 2)

    train: Range = (2, 4)

    def sized(self, length: int) -> int:
        return max(1, min(isqrt(length), self.largest))

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        n, rows = int(size.max()), np.arange(len(size))
        inside = np.arange(n) < size[:, None]
        square = inside[:, :, None] & inside[:, None, :]
        down, right = np.ogrid[:n, :n]
        shell = np.maximum(down, right)  # entries shell by shell, so that none depends on the largest size
        entry = shell**2 + np.where(down == shell, right, shell + 1 + down)
        a, b = (dice.below(10, n * n)[:, entry] * square for _ in range(2))
        c = a @ b
        wrong = dice.below(2) == 1
        row, column, error = dice.below(size), dice.below(size), 1 + dice.below(9)
        error = np.where((dice.below(2) == 1) & (c[rows, row, column] >= error), -error, error)
        c[rows, row, column] += np.where(wrong, error, 0)
        question = text("a=", _matrix(a, square), "; b=", _matrix(b, square), "; c=", _matrix(c, square), "; equal=")
        return Examples(question, np.where(wrong, ord("n"), ord("y"))[:, None].astype(np.uint8), size)

    def solve(self, question: str) -> str:
        given = (part.split("=")[1].split("/") for part in question.removesuffix("; equal=").split("; "))
        a, b, c = ([[int(entry) for entry in row.split(",")] for row in rows] for rows in given)
        product = [
            [sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a
        ]
        return "y" if product == c else "n"

    def chance(self, size: int) -> float:
        return 1 / 2

    def max_answer(self, size: int) -> int:
        return 1


def _matrix(entries: np.ndarray, square: np.ndarray) -> np.ndarray:
    """``1,2/3,4``: codes [rows of the batch, anything]."""
    cells = decimals(entries, square, ",")
    cells[:, :, 0, 0] = np.where(square[:, :, 0], ord("/"), 0)
    cells[:, 0, 0, 0] = 0
    return cells.reshape(len(entries), -1)
