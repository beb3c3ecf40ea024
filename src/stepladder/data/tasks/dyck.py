"""Do the brackets match?"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.core.config import Field
from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import text

_OPEN, _CLOSE = np.frombuffer(b"([{", np.uint8), np.frombuffer(b")]}", np.uint8)


@task("dyck")
class Dyck(Task):
    """Balanced or not, with brackets of several types.

    ``d:([[]])=`` -> ``y``, ``d:([[])]=`` -> ``n``

    Size is the number of pairs, half the length; the nesting is never deeper than ``depth``, at any size. Half of the
    items are balanced. The others are balanced strings in which two closing brackets of different type, one pair
    directly around the other, have changed places. So the length, the number of each bracket, the depth at every
    place and the neighbours of every bracket are those of a balanced string: nothing that counts can tell, only a
    stack. Source: Hewitt et al. 2020 (Dyck-(k, m)); Suzgun et al. 2019. Differs from them in: recognition, with
    negatives of this kind, instead of prediction.
    """

    axis: ClassVar[str] = "pairs"
    alphabet: ClassVar[str] = "()[]{}d:=yn"
    smallest: ClassVar[int] = 3
    largest: ClassVar[int] = 512

    train: Range = (4, 12)
    types: int = Field(2, ge=2, le=3, description="types of brackets")
    depth: int = Field(6, ge=3, le=64, description="deepest nesting")

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        n, rows, length = len(size), np.arange(len(size)), 2 * int(size.max())
        coins, kinds = dice.below(2**32, length), dice.below(self.types, length)
        symbols = np.zeros((length, n), np.uint8)
        depths = np.zeros((length, n), np.int64)  # behind the symbol
        crossable = np.zeros((length, n), bool)  # closes a pair, not empty, directly inside one of another type
        stack = np.zeros((self.depth + 2, n), np.int64)
        depth, closed = np.zeros(n, np.int64), np.zeros(n, bool)
        for place in range(length):
            left = 2 * size - place
            # The share of opening brackets that makes all balanced strings equally likely (Arnold & Sleep 1980).
            opens = coins[:, place] * 2 * left * (depth + 1) < 2**32 * (left - depth) * (depth + 2)
            opens &= depth < self.depth
            top, around, kind = stack[depth, rows], stack[depth - 1, rows], kinds[:, place]
            stack[depth + 1, rows] = kind  # lies above the top, unless this opens
            depth = np.where(left > 0, depth + np.where(opens, 1, -1), 0)
            symbols[place] = np.where(left > 0, np.where(opens, _OPEN[kind], _CLOSE[top]), 0)
            crossable[place] = ~opens & closed & (depth > 0) & (top != around)
            depths[place], closed = depth, ~opens

        inner = np.where(crossable, 1 + dice.below(2**32, length).T, 0).argmax(axis=0)
        behind = np.arange(length)[:, None] > inner
        outer = (behind & (depths == depths[inner, rows] - 1)).argmax(axis=0)
        balanced = dice.below(2) == 1
        crossed = symbols.copy()
        crossed[inner, rows], crossed[outer, rows] = symbols[outer, rows], symbols[inner, rows]
        answer = np.where(balanced, ord("y"), ord("n"))
        # A string without two such pairs has no unbalanced twin: it is drawn again, whichever of them was wanted.
        answer = np.where(crossable.any(axis=0), answer, 0)[:, None].astype(np.uint8)
        return Examples(text("d:", np.where(balanced, symbols, crossed).T, "="), answer, size)

    def solve(self, question: str) -> str:
        stack: list[str] = []
        for bracket in question.removeprefix("d:").removesuffix("="):
            if bracket in "([{":
                stack.append(bracket)
            elif not stack or stack.pop() + bracket not in ("()", "[]", "{}"):
                return "n"
        return "n" if stack else "y"

    def chance(self, size: int) -> float:
        return 1 / 2

    def max_answer(self, size: int) -> int:
        return 1
