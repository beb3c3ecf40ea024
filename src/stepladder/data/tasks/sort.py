"""Put it in order."""

from __future__ import annotations

from math import comb
from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import text, within


@task("sort")
class Sort(Task):
    """The same symbols in ascending order.

    ``o:3141=`` -> ``1134``

    Size is the number of symbols, uniform digits. Source: Graves et al. 2014, "Neural Turing machines" (priority sort);
    Delétang et al. 2023 (bucket sort; train short, test long). Differs from them in: the symbols are their own
    priorities; ten of them instead of five.
    """

    axis: ClassVar[str] = "symbols"
    alphabet: ClassVar[str] = "0123456789o:="
    growth: ClassVar[tuple[float, ...]] = (1.25, 1.5, 2, 4)

    train: Range = (2, 10)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        filled = within(size)
        digits = np.where(filled, dice.below(10, filled.shape[1]) + ord("0"), 0).astype(np.uint8)
        # Empty cells are 0 and come first; text() moves them to the right.
        return Examples(text("o:", digits, "="), text(np.sort(digits, axis=1)), size)

    def solve(self, question: str) -> str:
        return "".join(sorted(question.removeprefix("o:").removesuffix("=")))

    def chance(self, size: int) -> float:
        return 1 / comb(size + 9, 9)

    def max_answer(self, size: int) -> int:
        return size
