"""Which number has more than half of the places?"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, task
from stepladder.data.programs import ArrayProgram, array
from stepladder.data.symbols import decimals, joined, text

_NONE = np.frombuffer(b"none", np.uint8)


@task("majority")
class Majority(ArrayProgram):
    """The number that fills more than half of an array, or ``none``.

    ``arr=5,-3,5,5; majority=`` -> ``5``, ``arr=5,-3,5,1; majority=`` -> ``none``

    Size is the length of the array. One number has a share of the places from 3 to 9 tenths, so about a quarter of the
    items have no majority, most of them nearly one. Source: Boyer & Moore 1981, "MJRTY"; of the kind of VecTur's
    CompGen. Differs from it in: nothing is promised about a majority.
    """

    complexity: ClassVar[str] = "O(n) time, O(1) space"
    alphabet: ClassVar[str] = "0123456789-,;= armjoityne"

    train: Range = (4, 16)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        numbers, filled = self.numbers(dice, size)
        common = self.low + dice.below(self.high - self.low + 1)
        share = 30 + dice.below(61)
        numbers = np.where(filled & (dice.below(100, numbers.shape[1]) < share[:, None]), common[:, None], numbers)
        # A majority fills the middle of the sorted array.
        ordered = np.sort(np.where(filled, numbers, self.high + 1), axis=1)
        middle = np.take_along_axis(ordered, size[:, None] // 2, axis=1)
        found = 2 * np.count_nonzero(ordered == middle, axis=1) > size
        answer = text(np.where(found[:, None], decimals(middle)[:, 0], 0), np.where(found[:, None], 0, _NONE))
        return Examples(text("arr=", joined(numbers, filled), "; majority="), answer, size)

    def solve(self, question: str) -> str:
        numbers = array(question.removesuffix("; majority="))
        value, times = Counter(numbers).most_common(1)[0]
        return str(value) if 2 * times > len(numbers) else "none"

    def chance(self, size: int) -> float:
        return 1 / (self.high - self.low + 2)

    def max_answer(self, size: int) -> int:
        return max(self.digits(), len("none"))
