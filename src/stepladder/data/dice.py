"""The random numbers that tasks draw with."""

from __future__ import annotations

import numpy as np

from stepladder.core.keys import below

GOLDEN = 0x9E3779B97F4A7C15
"""2**64 / golden ratio: the step of SplitMix64."""


def mix(words: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that scatters every bit and keeps 0 (the finaliser of SplitMix64; Steele et al. 2014)."""
    words = words ^ (words >> np.uint64(30))
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


class Dice:
    """Random numbers for a batch of candidates; every call is a fresh throw.

    Row i depends on the i-th candidate's words only, and column j does not depend on how many columns are asked for:
    so an item is the same whichever batch it is drawn in. (SplitMix64 started at Philox words.)
    """

    def __init__(self, words: np.ndarray) -> None:
        self._words = words
        self._throws = 0

    def words(self, columns: int) -> np.ndarray:
        """Uniform uint64 [n, columns]."""
        lap, lane = divmod(self._throws, self._words.shape[1])
        self._throws += 1
        steps = np.arange(1, columns + 1, dtype=np.uint64) + np.uint64(lap << 32)
        return mix(self._words[:, lane, None] + steps * np.uint64(GOLDEN))

    def below(self, bound: int | np.ndarray, columns: int | None = None) -> np.ndarray:
        """Uniform int64 in [0, bound): [n], or [n, columns]. The bound may differ from row to row ([n])."""
        if columns is None:
            return below(self.words(1)[:, 0], bound)
        return below(self.words(columns), bound if isinstance(bound, int) else bound[:, None])
