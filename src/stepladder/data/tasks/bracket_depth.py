"""How deep does it nest?"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, task
from stepladder.data.programs import Program
from stepladder.data.symbols import decimals, text, within


@task("bracket_depth")
class BracketDepth(Program):
    """The most brackets that are open at a time.

    ``s=(()(()); depth=`` -> ``3``

    Size is the number of brackets. None closes that was not opened, but some may stay open; the share of opening
    brackets differs from item to item, so that the depths are spread. Source: of the kind of VecTur's CompGen.
    Differs from it in: brackets instead of numbers.
    """

    complexity: ClassVar[str] = "O(n) time, O(1) space"
    axis: ClassVar[str] = "brackets"
    alphabet: ClassVar[str] = "0123456789;= s()depth"
    smallest: ClassVar[int] = 2

    train: Range = (8, 24)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        filled = within(size)
        share = 50 + dice.below(50)
        opens = dice.below(100, filled.shape[1]) < share[:, None]
        # The distance of a walk from 0 goes one up or one down, and up from 0.
        depth = np.abs(np.cumsum(np.where(opens, 1, -1), axis=1, dtype=np.int32))
        rises = np.diff(depth, axis=1, prepend=0) > 0
        brackets = np.where(filled, np.where(rises, ord("("), ord(")")), 0)
        deepest = np.where(filled, depth, 0).max(axis=1)[:, None]
        return Examples(text("s=", brackets, "; depth="), text(decimals(deepest)[:, 0]), size)

    def solve(self, question: str) -> str:
        depth = deepest = 0
        for bracket in question.removeprefix("s=").removesuffix("; depth="):
            depth += 1 if bracket == "(" else -1
            deepest = max(deepest, depth)
        return str(deepest)

    def chance(self, size: int) -> float:
        return 1 / size

    def max_answer(self, size: int) -> int:
        return len(str(size))
