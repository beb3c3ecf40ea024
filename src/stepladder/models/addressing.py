"""How heads find their slots in an external memory: by content, by shifting, by sharpening.

Suffixes: B batch, Q heads, N slots, M slot width, S shifts.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6
"""Added to squared norms: a slot or key of zeros has cosine 0 with everything."""

TINY = 1e-30
"""Added to shifted weights before their logarithm; far below any weight that matters, and representable in float32."""


def content(key_BQM: Tensor, strength_BQ: Tensor, memory_BNM: Tensor) -> Tensor:
    """softmax over slots of strength x cosine(key, slot)."""
    length_BQ, length_BN = (length(each) for each in (key_BQM, memory_BNM))
    products_BQN = key_BQM @ memory_BNM.transpose(1, 2)
    return (products_BQN * (strength_BQ / length_BQ)[..., None] / length_BN[:, None]).softmax(-1)


def rotate(w_BQN: Tensor, shift_BQS: Tensor) -> Tensor:
    """Circular convolution: shift number s of S moves the weights by (S - 1) / 2 - s slots upwards."""
    reach = shift_BQS.shape[-1] // 2
    moved = (w_BQN.roll(reach - by, -1) * shift_BQS[..., by, None] for by in range(shift_BQS.shape[-1]))
    return sum(moved, torch.zeros_like(w_BQN))


def sharpen(w_BQN: Tensor, sharp_BQ: Tensor) -> Tensor:
    """w^gamma / sum w^gamma, in logarithms: no power can under- or overflow."""
    return (sharp_BQ[..., None] * (w_BQN + TINY).log()).softmax(-1)


def length(v: Tensor) -> Tensor:
    return (v.square().sum(-1) + EPS).sqrt()
