"""Small steps upwards from a large number."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.core.config import Field
from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import add, digits_of, number, numeral, text, until, within


@task("chain")
class Chain(Task):
    """A number to which single digits are added one after the other.

    ``39995>2>1>4=`` -> ``40002``

    Size is the number of digits of the start. Above a remainder of two digits it is a run of nines, of any length up
    to the whole number, and the steps carry over it in about half of the items: which half, the last two digits
    decide, and what they decide reaches the digit in front of the run. The order of the steps makes no new question.
    Source: the "chain" task of the ReLSM ablation ladder. Differs from it in: runs as long as the number, which its
    five nines at most leave to copying; near misses; a fixed number of steps, from 1 to 9 each.
    """

    axis: ClassVar[str] = "digits"
    alphabet: ClassVar[str] = "0123456789>="
    smallest: ClassVar[int] = 3

    train: Range = (3, 12)
    steps: int = Field(3, ge=1, le=10, description="how many digits are added")

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        steps = 1 + dice.below(9, self.steps)
        total = steps.sum(axis=1)
        start = number(dice, size, int(size.max()))
        nines = within(2 + dice.below(size - 1))
        start[:, : nines.shape[1]][nines] = 9
        # The start is `short` steps below the next carry: 9 - digit of `short`, which borrows from nobody.
        short = dice.below(np.minimum(2 * total, 100))
        start[:, 0] -= short % 10
        start[:, 1] -= short // 10
        written = np.stack([np.full_like(steps, ord(">")), steps + ord("0")], axis=2).reshape(len(size), -1)
        answer = numeral(add(start, digits_of(total)))
        return Examples(text(numeral(start), written, "="), text(answer), size)

    def canonical(self, examples: Examples) -> np.ndarray:
        return text(until(examples.question, ">"), ">", examples.answer)

    def solve(self, question: str) -> str:
        return str(sum(map(int, question.rstrip("=").split(">"))))

    def chance(self, size: int) -> float:
        return 1 / (9 * 10 ** (size - 1) + 8 * self.steps)

    def max_answer(self, size: int) -> int:
        return size + 1
