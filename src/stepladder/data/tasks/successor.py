"""The number after this one."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import add, number, numeral, text, within


@task("successor")
class Successor(Task):
    """A natural number plus one: a copy, but for the carry.

    ``s:4999=`` -> ``5000``, ``s:4990=`` -> ``4991``

    Size is the number of digits. Half of the items end in a run of nines of any length up to all of them, uniformly;
    in uniform numbers one in ten ends in a single 9. Source: the "successor" task of the ReLSM ablation ladder.
    Differs from it in: the runs of nines, without which it is the copy task.
    """

    axis: ClassVar[str] = "digits"
    alphabet: ClassVar[str] = "0123456789s:="

    train: Range = (2, 16)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        n = number(dice, size, int(size.max()))
        run = np.where(dice.below(2) == 1, 1 + dice.below(size), 0)
        nines = within(run)
        n[:, : nines.shape[1]][nines] = 9
        one = np.ones((len(size), 1), np.int64)
        return Examples(text("s:", numeral(n), "="), text(numeral(add(n, one))), size)

    def solve(self, question: str) -> str:
        return str(int(question.removeprefix("s:").removesuffix("=")) + 1)

    def chance(self, size: int) -> float:
        return 1 / (9 * 10 ** (size - 1)) if size > 1 else 1 / 10

    def max_answer(self, size: int) -> int:
        return size + 1
