"""Where does it belong?"""

from __future__ import annotations

from bisect import bisect_left
from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, task
from stepladder.data.programs import ArrayProgram, array
from stepladder.data.symbols import decimals, joined, text


@task("binary_search")
class BinarySearch(ArrayProgram):
    """The first place of a sorted array, counted from 0, at which a key can be inserted.

    ``key=4; arr=-7,1,4,4,9; at=`` -> ``2``

    Size is the length of the array. Half of the keys are in it. Source: Knuth 1973, "Sorting and searching", 6.2.1; of
    the kind of VecTur's CompGen, which has no logarithmic program. Differs from it in: the place is asked for whether
    the key is there or not.
    """

    complexity: ClassVar[str] = "O(log n) time, O(1) space"
    alphabet: ClassVar[str] = "0123456789-,;= keyart"

    train: Range = (4, 16)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        numbers, filled = self.numbers(dice, size)
        member = numbers[np.arange(len(size)), dice.below(size)]
        numbers = np.sort(np.where(filled, numbers, self.high + 1), axis=1)
        free = self.low + dice.below(self.high - self.low + 1)
        wanted = np.where(dice.below(2) == 1, member, free)[:, None]
        at = np.count_nonzero(numbers < wanted, axis=1)[:, None]
        question = text("key=", decimals(wanted)[:, 0], "; arr=", joined(numbers, filled), "; at=")
        return Examples(question, text(decimals(at)[:, 0]), size)

    def solve(self, question: str) -> str:
        wanted, numbers = question.removesuffix("; at=").split("; ")
        return str(bisect_left(array(numbers), int(wanted.removeprefix("key="))))

    def chance(self, size: int) -> float:
        return 1 / (size + 1)

    def max_answer(self, size: int) -> int:
        return len(str(size))
