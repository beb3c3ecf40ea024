"""Say it again."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import text, within


@task("copy")
class Copy(Task):
    """The same symbols again: content and place, nothing to compute.

    ``c:3141=`` -> ``3141``

    Size is the number of symbols, uniform digits. Source: Graves et al. 2014, "Neural Turing machines" (copy);
    Delétang et al. 2023 (train short, test long). Differs from them in: ten symbols instead of two or of bit vectors.
    """

    axis: ClassVar[str] = "symbols"
    alphabet: ClassVar[str] = "0123456789c:="
    growth: ClassVar[tuple[float, ...]] = (1.25, 1.5, 2, 4)

    train: Range = (2, 10)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        filled = within(size)
        digits = np.where(filled, dice.below(10, filled.shape[1]) + ord("0"), 0)
        return Examples(text("c:", digits, "="), text(digits), size)

    def solve(self, question: str) -> str:
        return question.removeprefix("c:").removesuffix("=")

    def chance(self, size: int) -> float:
        return 10.0**-size

    def max_answer(self, size: int) -> int:
        return size
