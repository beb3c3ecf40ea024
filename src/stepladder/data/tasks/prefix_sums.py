"""Running totals."""

from __future__ import annotations

from itertools import accumulate
from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, task
from stepladder.data.programs import ListProgram, array
from stepladder.data.symbols import joined, text


@task("prefix_sums")
class PrefixSums(ListProgram):
    """All sums of the first one, two, three, ... numbers of an array.

    ``arr=3,-1,4; prefix=`` -> ``3,2,6``

    Size is the length of the array. Source: "prefix_sums" of VecTur's CompGen. Differs from it in: nothing.
    """

    complexity: ClassVar[str] = "O(n) time, O(n) space"
    alphabet: ClassVar[str] = "0123456789-,;= arpefix"

    train: Range = (4, 16)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        numbers, filled = self.numbers(dice, size)
        sums = np.where(filled, numbers.cumsum(axis=1), 0)
        return Examples(text("arr=", joined(numbers, filled), "; prefix="), text(joined(sums, filled)), size)

    def solve(self, question: str) -> str:
        return ",".join(map(str, accumulate(array(question.removesuffix("; prefix=")))))

    def chance(self, size: int) -> float:
        return float(self.high - self.low + 1) ** -size

    def max_answer(self, size: int) -> int:
        return sum(map(self.digits, range(1, size + 1))) + size - 1
