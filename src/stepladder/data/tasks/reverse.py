"""Say it backwards."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import text, within


@task("reverse")
class Reverse(Task):
    """The same symbols in the opposite order.

    ``r:3141=`` -> ``1413``

    Size is the number of symbols, uniform digits. Source: Graves et al. 2014, "Neural Turing machines" (copy);
    Delétang et al. 2023 (train short, test long). Differs from them in: ten symbols instead of two or of bit vectors.
    """

    axis: ClassVar[str] = "symbols"
    alphabet: ClassVar[str] = "0123456789r:="
    growth: ClassVar[tuple[float, ...]] = (1.25, 1.5, 2, 4)

    train: Range = (2, 10)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        filled = within(size)
        digits = np.where(filled, dice.below(10, filled.shape[1]) + ord("0"), 0)
        return Examples(text("r:", digits, "="), text(digits[:, ::-1]), size)

    def solve(self, question: str) -> str:
        return question.removeprefix("r:").removesuffix("=")[::-1]

    def chance(self, size: int) -> float:
        return 10.0**-size

    def max_answer(self, size: int) -> int:
        return size
