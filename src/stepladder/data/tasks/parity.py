"""Is the number of ones odd?"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import text, within


@task("parity")
class Parity(Task):
    """The parity of a string of bits: the smallest state that a machine must carry along.

    ``0110^=`` -> ``0``, ``01101^=`` -> ``1``

    Size is the number of bits, leading zeros included, so neither length nor first bit tells anything; the labels are
    balanced because the bits are. Source: Hahn 2020, "Theoretical limitations of self-attention"; train short, test
    long as in Delétang et al. 2023. Differs from them in: nothing.
    """

    axis: ClassVar[str] = "bits"
    alphabet: ClassVar[str] = "01^="

    train: Range = (4, 16)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        filled = within(size)
        bits = np.where(filled, dice.below(2, filled.shape[1]), 0)
        digits = np.where(filled, bits + ord("0"), 0)
        odd = bits.sum(axis=1, keepdims=True) % 2
        return Examples(text(digits, "^="), text(odd + ord("0")), size)

    def solve(self, question: str) -> str:
        return "1" if question.count("1") % 2 else "0"

    def chance(self, size: int) -> float:
        return 1 / 2

    def max_answer(self, size: int) -> int:
        return 1
