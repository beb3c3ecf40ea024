"""Which of two numbers is greater?"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import number, numeral, sorted_operands, text


@task("compare")
class Compare(Task):
    """The order of two natural numbers: less, greater or equal.

    ``4711?4721=`` -> ``<``, ``83?9=`` -> ``>``, ``52?52=`` -> ``=``

    Size is the number of digits of the longer one. A third of the items are ties. In a quarter of the others the
    lengths differ; in the rest the first difference is at a place drawn uniformly, and half of the time it is the
    only one. ``a?b`` and ``b?a`` are one question. Source: the "compare" task of the ReLSM ablation ladder. Differs
    from it in: ties (0.07 % there), near ties and unequal lengths.
    """

    axis: ClassVar[str] = "digits"
    alphabet: ClassVar[str] = "0123456789?<>="

    train: Range = (1, 6)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        rows, width = np.arange(len(size)), int(size.max())
        a = number(dice, size, width)

        at = dice.below(size)  # the column of the first difference; the leading digit stays above 0
        floor = ((at == size - 1) & (size > 1)).astype(np.int64)
        digit = floor + (a[rows, at] - floor + 1 + dice.below(9 - floor)) % (10 - floor)
        fresh = (np.arange(width) < at[:, None]) & (dice.below(2) == 1)[:, None]
        b = np.where(fresh, dice.below(10, width), a)
        b[rows, at] = digit

        unequal = (dice.below(4) == 0) & (size > 1)
        shorter = number(dice, 1 + dice.below(np.maximum(size - 1, 1)), width)
        b = np.where(unequal[:, None], shorter, b)

        greater = unequal | (a[rows, at] > digit)
        label = dice.below(3)  # places in "=<>"
        b = np.where((label == 0)[:, None], a, b)
        swap = (greater == (label == 1))[:, None]
        question = text(numeral(np.where(swap, b, a)), "?", numeral(np.where(swap, a, b)), "=")
        return Examples(question, np.frombuffer(b"=<>", np.uint8)[label, None], size)

    def canonical(self, examples: Examples) -> np.ndarray:
        return sorted_operands(examples.question, "?")

    def solve(self, question: str) -> str:
        a, b = map(int, question.rstrip("=").split("?"))
        return "<" if a < b else ">" if a > b else "="

    def chance(self, size: int) -> float:
        return 1 / 3

    def max_answer(self, size: int) -> int:
        return 1
