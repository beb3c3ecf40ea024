"""How often does it occur?"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.core.config import Field
from stepladder.data.base import Dice, Examples, Range, task
from stepladder.data.programs import StringProgram
from stepladder.data.symbols import decimals, text, within


@task("substring_count")
class SubstringCount(StringProgram):
    """The number of places at which a pattern occurs in a string; occurrences may overlap.

    ``s=abaababa; p=aba; count=`` -> ``3``

    Size is the length of the string; the pattern has one to ``longest`` letters. Source: the naive string matcher of
    Cormen et al., 32.1; of the kind of VecTur's CompGen. Differs from it in: occurrences are counted; two letters, so
    that there are some.
    """

    complexity: ClassVar[str] = "O(n m) time for a pattern of m letters, O(1) space"
    smallest: ClassVar[int] = 4

    train: Range = (6, 16)
    letters: int = Field(2, ge=2, le=26, description="how many letters")
    longest: int = Field(3, ge=1, le=4, description="letters of the longest pattern")

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        filled = within(size)
        width = filled.shape[1]
        s = np.where(filled, self.word(dice, width), 0)
        length = 1 + dice.below(np.full(len(size), self.longest))
        p = self.word(dice, self.longest)
        p[np.arange(self.longest) >= length[:, None]] = 0
        fits = filled.copy()
        for place in range(self.longest):
            ahead = np.zeros_like(s)
            ahead[:, : width - place] = s[:, place:]
            fits &= (ahead == p[:, place, None]) | (place >= length)[:, None]
        count = np.count_nonzero(fits, axis=1)[:, None]
        return Examples(text("s=", s, "; p=", p, "; count="), text(decimals(count)[:, 0]), size)

    def solve(self, question: str) -> str:
        s, p = (part.split("=")[1] for part in question.removesuffix("; count=").split("; "))
        return str(sum(s.startswith(p, place) for place in range(len(s))))

    def chance(self, size: int) -> float:
        return 1 / (size + 1)

    def max_answer(self, size: int) -> int:
        return len(str(size))
