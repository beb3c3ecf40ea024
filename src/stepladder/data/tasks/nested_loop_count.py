"""How many pairs add up?"""

from __future__ import annotations

from itertools import combinations
from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, task
from stepladder.data.programs import ArrayProgram, array
from stepladder.data.symbols import decimals, joined, text


@task("nested_loop_count")
class NestedLoopCount(ArrayProgram):
    """The number of pairs of places i < j of an array whose numbers add up to a target.

    ``target=4; arr=1,3,2,2,3=`` -> ``3``

    Size is the length of the array. Source: "nested_loop_count" of VecTur's CompGen. Differs from it in: the numbers
    of an item lie in a window of random width, and three times in four the target is the sum of two of them; with
    uniform numbers and targets nearly all answers are 0.
    """

    complexity: ClassVar[str] = "O(n^2) time, O(1) space"
    alphabet: ClassVar[str] = "0123456789-,;= targe"
    smallest: ClassVar[int] = 2

    train: Range = (4, 16)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        numbers, filled = self.numbers(dice, size)
        width = 1 + dice.below(dice.below(self.high - self.low + 1) + 1)
        start = self.low + dice.below(self.high - self.low + 2 - width)
        numbers = np.where(filled, start[:, None] + (numbers - self.low) % width[:, None], 0)
        one, other = (numbers[np.arange(len(size)), dice.below(size)] for _ in range(2))
        free = self.low + dice.below(self.high - self.low + 1)
        target = np.where(dice.below(4) > 0, one + other, free)

        kind = np.int16 if max(-self.low, self.high) < 2**13 else np.int32
        columns = np.where(filled, numbers, 4 * max(-self.low, self.high)).T.astype(kind)  # the filling adds up to none
        count = np.zeros(len(size), np.int64)
        for place, number in enumerate(columns):
            count += (columns[place + 1 :] == target.astype(kind) - number).sum(axis=0, dtype=np.int16)
        question = text("target=", decimals(target[:, None])[:, 0], "; arr=", joined(numbers, filled), "=")
        return Examples(question, text(decimals(count[:, None])[:, 0]), size)

    def solve(self, question: str) -> str:
        target, numbers = question.removesuffix("=").split("; ")
        wanted = int(target.removeprefix("target="))
        return str(sum(a + b == wanted for a, b in combinations(array(numbers), 2)))

    def chance(self, size: int) -> float:
        return 1 / (size * (size - 1) // 2 + 1)

    def max_answer(self, size: int) -> int:
        return len(str(size * (size - 1) // 2))
