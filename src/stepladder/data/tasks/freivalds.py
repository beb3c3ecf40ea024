"""Is this the product?"""

from __future__ import annotations

from math import isqrt
from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, task
from stepladder.data.programs import Claim
from stepladder.data.symbols import decimals, text, until


@task("freivalds")
class Freivalds(Claim):
    """Whether the product of two square matrices is a third one: y or n.

    ``a=1,2/3,4; b=0,1/1,1; c=2,3/4,7; equal=`` -> ``y``, ``a=2; b=3; c=7; equal=`` -> ``n``

    Size is the number of rows; the entries of a and b are digits. In half of the items one entry of c is wrong, by 1 to
    9. A fixed algorithm multiplies; with random numbers one can do with less: a (b r) = c r for a random vector r of
    zeros and ones holds for a wrong c at most half of the time (here: half of the time). With ``rounds`` such vectors
    in the question (``...; r=0,1/1,1; equal=``) the check is wrong once in 2^rounds. Source: Freivalds 1977; of
    VecTur's randomised suite. Differs from it in: the claim is a b = c.
    """

    complexity: ClassVar[str] = "O(n^2) time with random numbers, O(n^3) without; O(n) space"
    axis: ClassVar[str] = "rows"
    alphabet: ClassVar[str] = "0123456789,/;= abcrequlyn"
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
        random: list[str | np.ndarray] = []
        if self.rounds:
            bits = dice.below(2, self.rounds * self.largest).reshape(len(size), self.rounds, self.largest)[:, :, :n]
            given = np.repeat(inside[:, None, :], self.rounds, axis=1)
            random = ["; r=", _matrix(bits * given, given)]
        matrices = (_matrix(matrix, square) for matrix in (a, b, c))
        question = text("a=", next(matrices), "; b=", next(matrices), "; c=", next(matrices), *random, "; equal=")
        return Examples(question, np.where(wrong, ord("n"), ord("y"))[:, None].astype(np.uint8), size)

    def canonical(self, examples: Examples) -> np.ndarray:
        return text(until(examples.question, "r"), "equal=") if self.rounds else examples.question

    def solve(self, question: str) -> str:
        a, b, c, *_ = _read(question)
        product = [
            [sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a
        ]
        return "y" if product == c else "n"

    def accepts(self, question: str) -> bool:
        a, b, c, *random = _read(question)
        return all(_times(a, _times(b, r)) == _times(c, r) for vectors in random for r in vectors)


def _read(question: str) -> list[list[list[int]]]:
    """The matrices of a question."""
    given = (part.split("=")[1].split("/") for part in question.removesuffix("; equal=").split("; "))
    return [[[int(entry) for entry in row.split(",")] for row in rows] for rows in given]


def _times(matrix: list[list[int]], vector: list[int]) -> list[int]:
    return [sum(x * y for x, y in zip(row, vector, strict=True)) for row in matrix]


def _matrix(entries: np.ndarray, present: np.ndarray) -> np.ndarray:
    """``1,2/3,4``: codes [rows of the batch, anything]."""
    cells = decimals(entries, present, ",")
    cells[:, :, 0, 0] = np.where(present[:, :, 0], ord("/"), 0)
    cells[:, 0, 0, 0] = 0
    return cells.reshape(len(entries), -1)
