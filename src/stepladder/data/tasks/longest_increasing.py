"""How long a way up?"""

from __future__ import annotations

from bisect import bisect_left
from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, task
from stepladder.data.programs import ArrayProgram, array
from stepladder.data.symbols import decimals, joined, text


@task("longest_increasing")
class LongestIncreasing(ArrayProgram):
    """The length of the longest strictly increasing subsequence of an array.

    ``arr=5,1,4,2,7; lis=`` -> ``3``

    Size is the length of the array. A first part of it, from nothing to all, is sorted; uniform numbers nearly always
    have about twice the root of n. Source: Schensted 1961 (patience sorting); of the kind of VecTur's CompGen. Differs
    from it in: the sorted part.
    """

    complexity: ClassVar[str] = "O(n log n) time, O(n) space"
    alphabet: ClassVar[str] = "0123456789-,;= arlis"

    train: Range = (4, 16)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        numbers, filled = self.numbers(dice, size)
        width = numbers.shape[1]
        rising = np.arange(width) < dice.below(size + 1)[:, None]
        sort = np.sort(np.where(rising, numbers, self.high + 1), axis=1)
        numbers = np.where(rising, sort, numbers)

        top = self.high + 1
        kind = np.int16 if max(-self.low, top) < 2**15 else np.int32
        columns = np.where(filled, numbers, top).T.astype(kind)
        ends = np.full((width, len(size)), top, kind)  # the least last number of a rising run of each length
        for place, number in enumerate(columns):
            open_ended = ends[: place + 1] >= number
            open_ended[1:] &= ~open_ended[:-1].copy()  # the first that is not below the number becomes it
            np.copyto(ends[: place + 1], number, where=open_ended)
        length = np.count_nonzero(ends < top, axis=0)[:, None]
        return Examples(text("arr=", joined(numbers, filled), "; lis="), text(decimals(length)[:, 0]), size)

    def solve(self, question: str) -> str:
        ends: list[int] = []
        for number in array(question.removesuffix("; lis=")):
            place = bisect_left(ends, number)
            ends[place : place + 1] = [number]
        return str(len(ends))

    def chance(self, size: int) -> float:
        return 1 / min(size, self.high - self.low + 1)

    def max_answer(self, size: int) -> int:
        return len(str(min(size, self.high - self.low + 1)))
