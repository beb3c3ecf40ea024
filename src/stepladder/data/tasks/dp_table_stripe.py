"""How far apart are two words?"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.core.config import Field
from stepladder.data.base import Dice, Examples, Range, task
from stepladder.data.programs import StringProgram
from stepladder.data.symbols import decimals, text, within


@task("dp_table_stripe")
class DpTableStripe(StringProgram):
    """The edit distance of two strings: the fewest insertions, deletions and replacements from one to the other.

    ``s=abcab; t=bcb; dist=`` -> ``2``

    Size is the length of the longer string, which comes first. The other is what is left of it after some letters,
    from none to nearly all, were dropped and others drawn anew: two independent strings of a length are nearly always
    equally far apart. Of two strings of equal length the alphabetically smaller comes first, so that no pair is asked
    about in both orders. Source: "dp_table_stripe" of VecTur's CompGen (Levenshtein 1966). Differs from it in:
    strings that have something in common.
    """

    complexity: ClassVar[str] = "O(n^2) time, O(n) space"
    smallest: ClassVar[int] = 2

    train: Range = (4, 16)
    letters: int = Field(4, ge=2, le=26, description="how many letters")

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        n, filled = len(size), within(size)
        width = filled.shape[1]
        rows, column = np.arange(n), np.arange(width)
        s, fresh = np.where(filled, self.word(dice, width), 0), self.word(dice, width)
        dropped, replaced = (dice.below(100, width) < dice.below(90)[:, None] for _ in range(2))
        dropped &= (dice.below(2) == 1)[:, None] & (column > 0)
        t = np.zeros_like(s)
        kept = text(np.where(dropped | ~filled, 0, np.where(replaced, fresh, s)))
        t[:, : kept.shape[1]] = kept

        first = (rows, (s != t).argmax(axis=1))  # where they first differ
        swap = ((t != 0) == filled).all(axis=1) & (s[first] > t[first])
        s, t = np.where(swap[:, None], t, s), np.where(swap[:, None], s, t)
        distance = _distances(s, size, t, (t != 0).sum(axis=1))
        question = text("s=", s, "; t=", t, "; dist=")
        return Examples(question, text(decimals(distance[:, None])[:, 0]), size)

    def solve(self, question: str) -> str:
        s, t = (part.split("=")[1] for part in question.removesuffix("; dist=").split("; "))
        row = list(range(len(t) + 1))
        for i, a in enumerate(s, start=1):
            above = row
            row = [i]
            for j, b in enumerate(t, start=1):
                row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
        return str(row[-1])

    def chance(self, size: int) -> float:
        return 1 / (size + 1)

    def max_answer(self, size: int) -> int:
        return len(str(size))


def _distances(s: np.ndarray, s_length: np.ndarray, t: np.ndarray, t_length: np.ndarray) -> np.ndarray:
    """Edit distances [n] of the rows of two matrices of codes.

    Source: Myers 1999, "A fast bit-vector algorithm for approximate string matching", with the borders of the whole
    distance (Hyyrö 2003). A column of the table is a word of its rises and one of its falls, 64 rows in each; for every
    letter of s the words give way to those of the next column, and the last row says how the distance changed.
    """
    words = -(-t.shape[1] // 64)
    padded = np.zeros((len(t), 64 * words), np.uint8)
    padded[:, : t.shape[1]] = t
    letters = range(ord("a"), int(s.max()) + 1)
    equals = np.stack([np.packbits(padded == letter, axis=1, bitorder="little").view("<u8").T for letter in letters])
    rows = np.arange(len(t))
    one, top = np.uint64(1), np.uint64(63)
    rises, falls = np.full((words, len(t)), ~np.uint64(0)), np.zeros((words, len(t)), np.uint64)
    last_word, last_bit = (t_length - 1) // 64, ((t_length - 1) % 64).astype(np.uint64)
    distance = t_length.copy()
    for place in range(s.shape[1]):
        letter = np.maximum(s[:, place], ord("a")) - ord("a")
        up, down = np.ones(len(t), np.uint64), np.zeros(len(t), np.uint64)  # what the row above did: the border rises
        for word in range(words):
            equal, rise, fall = equals[letter, word, rows], rises[word], falls[word]
            crossed = equal | down
            level = (((crossed & rise) + rise) ^ rise) | crossed
            higher, lower = fall | ~(level | rise), rise & level
            here = (last_word == word) & (place < s_length)
            change = ((higher >> last_bit) & one).astype(np.int64) - ((lower >> last_bit) & one).astype(np.int64)
            distance += np.where(here, change, 0)
            higher_in, lower_in = (higher << one) | up, (lower << one) | down
            up, down = higher >> top, lower >> top
            rises[word] = lower_in | ~(equal | fall | higher_in)
            falls[word] = higher_in & (equal | fall)
    return distance
