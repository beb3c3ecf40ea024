"""Where is everything after all these moves?"""

from __future__ import annotations

from itertools import permutations
from typing import ClassVar, Literal

import numpy as np

from stepladder.core.config import Field
from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import text, within


@task("state_tracking")
class StateTracking(Task):
    """The word problem of a permutation group: cups in a row, a word of moves, where does each cup end up?

    ``3:bd=`` -> ``321``: b makes 132 of 123, d makes 321 of that (d is 231: the second, the third, the first)

    Size is the number of moves. A letter names an arrangement of 1..n and means: take the cups that stand at these
    places, in this order. In S3 the letters a-f are its six arrangements in lexicographic order. S5 has 120, more
    than there are letters: a-x are every fifth, which generate the group. The answer is the arrangement in the end,
    from 12345. S5 is complete for NC1, beyond what a transformer of fixed depth can do; S3 is solvable. Source:
    Merrill et al. 2024, "The illusion of state"; Liu et al. 2023, "Transformers learn shortcuts to automata".
    Differs from them in: only the final state is asked for, and it is written out.
    """

    axis: ClassVar[str] = "moves"
    alphabet: ClassVar[str] = "abcdefghijklmnopqrstuvwx12345:="

    train: Range = (3, 12)
    group: Literal["S3", "S5"] = Field("S3", description="the symmetric group on 3 or on 5 cups")

    @property
    def moves(self) -> list[tuple[int, ...]]:
        """What each letter, from "a", does: the place (from 0) from which each cup is taken."""
        return list(permutations(range(3))) if self.group == "S3" else list(permutations(range(5)))[::5]

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        moves = np.array(self.moves)
        filled = within(size)
        letters = dice.below(len(moves), filled.shape[1])
        cups = np.tile(np.arange(1, moves.shape[1] + 1), (len(size), 1))
        for column in range(filled.shape[1]):
            moved = np.take_along_axis(cups, moves[letters[:, column]], axis=1)
            cups = np.where(filled[:, column, None], moved, cups)
        word = np.where(filled, letters + ord("a"), 0)
        return Examples(text(f"{moves.shape[1]}:", word, "="), text(cups + ord("0")), size)

    def solve(self, question: str) -> str:
        many, word = question.removesuffix("=").split(":")
        cups, moves = "12345"[: int(many)], self.moves
        for letter in word:
            cups = "".join(cups[place] for place in moves[ord(letter) - ord("a")])
        return cups

    def chance(self, size: int) -> float:
        return 1 / min(len(self.moves) ** size, 6 if self.group == "S3" else 120)

    def max_answer(self, size: int) -> int:
        return 3 if self.group == "S3" else 5
