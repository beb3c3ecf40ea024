"""Counter-based randomness: every random number is a pure function of a key and an index.

There is no global generator and no iterator state, so the same item comes out whatever the batch size, the number
of processes or the value of PYTHONHASHSEED. A key is 128 bits, derived from a seed and a path of names by SHA-256;
numbers under a key are blocks of the Philox-4x64 stream (Salmon et al., SC 2011, "Parallel random numbers: as easy
as 1, 2, 3") that starts at the item's index.
"""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass

import numpy as np

_BLOCK = 4  # Philox-4x64 yields four 64-bit words per counter value


@dataclass(frozen=True)
class Key:
    """128 random bits that name a stream. Derive children with ``key / "name"``; never use one key for two ends."""

    high: int
    low: int

    def __truediv__(self, name: str | int) -> Key:
        """The child key called ``name``; integers and strings never collide (``3`` is not ``"3"``)."""
        label = f"str:{name}".encode() if isinstance(name, str) else f"int:{operator.index(name)}".encode()
        digest = hashlib.sha256(self.high.to_bytes(8) + self.low.to_bytes(8) + label).digest()
        return Key(int.from_bytes(digest[:8]), int.from_bytes(digest[8:16]))

    def seed(self) -> int:
        """A non-negative 63-bit integer for libraries that want one (``torch.manual_seed``)."""
        return self.low >> 1

    def generator(self, index: int = 0) -> np.random.Generator:
        """A NumPy generator for item ``index``: 2**128 draws apart from every other item's."""
        counter = [0, 0, int(index) & (2**64 - 1), 1]
        return np.random.Generator(np.random.Philox(key=[self.low, self.high], counter=counter))

    def words(self, indices: np.ndarray, width: int) -> np.ndarray:
        """``width`` random uint64 words for every index: shape ``(len(indices), width)``.

        Row ``i`` depends on the key and ``indices[i]`` only. Nearby indices cost one vectorised sweep of the
        Philox stream; scattered ones cost a sweep each.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size == 0:
            return np.empty((0, width), dtype=np.uint64)
        first, last = int(indices.min()), int(indices.max())
        if first < 0:
            raise ValueError("indices must not be negative")
        if last - first < 128 * indices.size + 1024:
            return self._block(first, last - first + 1, width)[indices - first]
        return np.concatenate([self._block(int(i), 1, width) for i in indices])

    def _block(self, first: int, count: int, width: int) -> np.ndarray:
        per_item = -(-width // _BLOCK)
        start = first * per_item
        counter = [start & (2**64 - 1), start >> 64, 0, 0]
        raw = np.random.Philox(key=[self.low, self.high], counter=counter).random_raw(count * per_item * _BLOCK)
        return raw.reshape(count, per_item * _BLOCK)[:, :width]


def key(seed: int, *path: str | int) -> Key:
    """The key at ``path`` under an integer seed: ``key(7, "data", "parity", "train")``."""
    digest = hashlib.sha256(b"stepladder-key" + int(seed).to_bytes(16, signed=True)).digest()
    root = Key(int.from_bytes(digest[:8]), int.from_bytes(digest[8:16]))
    for name in path:
        root = root / name
    return root


def below(words: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Uniform integers in ``[0, bound)`` from uint64 words, for bounds up to 2**32 (bias below 2**-32)."""
    return (((words >> np.uint64(32)) * np.asarray(bound, dtype=np.uint64)) >> np.uint64(32)).astype(np.int64)


def unit(words: np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) with 53 bits from uint64 words."""
    return (words >> np.uint64(11)) * 2.0**-53


def permute(secret: Key, size: int, positions: np.ndarray) -> np.ndarray:
    """The keyed permutation of ``range(size)`` at ``positions``, in O(1) memory.

    A four-round Feistel network on the smallest even number of bits that holds ``size``, walked along its cycle
    until it lands inside (Black & Rogaway, 2002). So a corpus of any length is shuffled without a list.
    """
    if size <= 0:
        raise ValueError("a permutation needs at least one element")
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    rounds = secret.words(np.arange(4), 2)
    values = np.asarray(positions, dtype=np.uint64).copy()
    if values.size and int(values.max()) >= size:
        raise ValueError(f"positions must be below {size}")
    pending = np.ones(values.shape, dtype=bool)
    while pending.any():
        left, right = values[pending] >> np.uint64(half), values[pending] & mask
        for multiplier, offset in rounds:
            mixed = (right + offset) * (multiplier | np.uint64(1))
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        values[pending] = (left << np.uint64(half)) | right
        pending = values >= np.uint64(size)
    return values.astype(np.int64)


def hash64(text: str) -> int:
    """64 bits of a text's SHA-256: equal texts are told by it, whatever the process or the platform."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
