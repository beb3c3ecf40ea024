"""How often does each number occur?"""

from __future__ import annotations

from itertools import groupby
from math import comb
from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, task
from stepladder.data.programs import ListProgram, array
from stepladder.data.symbols import decimals, joined, text


@task("sort_then_scan")
class SortThenScan(ListProgram):
    """The run lengths of a sorted array: every value and how often it occurs.

    ``arr=3,-1,3; rle=`` -> ``-1:1,3:2``

    Size is the length of the array. Source: "sort_then_scan" of VecTur's CompGen. Differs from it in: in half of the
    items, all but every third number is one of the first few again, so that runs are longer than one.
    """

    complexity: ClassVar[str] = "O(n log n) time, O(1) space"
    alphabet: ClassVar[str] = "0123456789-,:;= arle"

    train: Range = (4, 16)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        numbers, filled = self.numbers(dice, size)
        width = numbers.shape[1]
        again = (dice.below(2) == 1)[:, None] & (dice.below(3, width) > 0)
        few = dice.below(np.minimum(size, 1 + size // 4), width)
        numbers = np.where(again & filled, np.take_along_axis(numbers, few, axis=1), numbers)
        question = text("arr=", joined(numbers, filled), "; rle=")

        ordered = np.sort(np.where(filled, numbers, self.high + 1), axis=1)
        first = filled.copy()
        first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
        # A run ends where the next begins: count back from the right.
        place = np.where(first, np.arange(width), size[:, None])
        after = np.minimum.accumulate(place[:, ::-1], axis=1)[:, ::-1]
        after = np.concatenate([after[:, 1:], size[:, None]], axis=1)
        counts = np.where(first, after - np.arange(width), 0)
        runs = np.concatenate([decimals(ordered, first, ","), decimals(counts, first, ":")], axis=2)
        runs[:, 0, 0] = 0
        return Examples(question, text(runs.reshape(len(size), -1)), size)

    def solve(self, question: str) -> str:
        ordered = sorted(array(question.removesuffix("; rle=")))
        return ",".join(f"{value}:{len(list(run))}" for value, run in groupby(ordered))

    def chance(self, size: int) -> float:
        return 1 / comb(size + self.high - self.low, size)

    def max_answer(self, size: int) -> int:
        return size * (self.digits() + len(":1,")) - 1
