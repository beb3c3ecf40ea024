"""Say it again, so and so many times."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.core.config import Field
from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import text, within


@task("repeat_copy")
class RepeatCopy(Task):
    """The same symbols again as often as is said: a loop around a copy.

    ``p:314x2=`` -> ``314314``

    Size is the number of symbols, uniform digits; how often is uniform from 1 to ``times``. Source: Graves et al. 2014,
    "Neural Turing machines" (repeat copy). Differs from it in: ten symbols instead of bit vectors; the number of times
    is a digit and always in the range trained on.
    """

    axis: ClassVar[str] = "symbols"
    alphabet: ClassVar[str] = "0123456789px:="
    growth: ClassVar[tuple[float, ...]] = (1.25, 1.5, 2, 4)

    train: Range = (2, 8)
    times: int = Field(3, ge=1, le=9, description="most repetitions")

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        filled = within(size)
        digits = np.where(filled, dice.below(10, filled.shape[1]) + ord("0"), 0)
        times = 1 + dice.below(np.full(len(size), self.times))[:, None]
        again = [np.where(lap < times, digits, 0) for lap in range(self.times)]
        return Examples(text("p:", digits, "x", times + ord("0"), "="), text(*again), size)

    def solve(self, question: str) -> str:
        symbols, times = question.removeprefix("p:").removesuffix("=").split("x")
        return symbols * int(times)

    def chance(self, size: int) -> float:
        return 10.0**-size / self.times

    def max_answer(self, size: int) -> int:
        return size * self.times
