"""Random numbers inside a model: a pure function of (row key, position in the document, site, tick, lane).

So noise does not depend on batch-mates, on how a sequence was cut into chunks, on what is packed beside it, or on
whether activations are recomputed. The mixing function is the 32-bit finaliser of MurmurHash3 (Appleby, public
domain), applied after each ingredient; arithmetic is int64 masked to 32 bits, so it is the same on every device.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from stepladder.models.base import Context

_MASK = 0xFFFFFFFF
Word = TypeVar("Word", int, Tensor)


def _mix(x: Word) -> Word:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def row_keys(key: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """One key a row: a tensor (B,) is taken as it is, an integer is spread over the rows."""
    if isinstance(key, Tensor):
        return key.to(device=device, dtype=torch.int64)
    # The integer is mixed before it meets the row number: row 2 of key 1 must not be row 1 of key 2.
    first = _mix(_mix(key & _MASK) ^ ((key >> 32) & _MASK))
    second = _mix(first ^ 0x9E3779B1)
    rows = torch.arange(batch, device=device, dtype=torch.int64)
    return (_mix(rows ^ first) << 31) ^ _mix(rows ^ second)


def uniform(ctx: Context, site: int, lanes: int) -> Tensor:
    """Uniform numbers in [0, 1), shape (B, T, lanes), 24 bits each. ``site`` tells one stochastic part from another.

    Dropout counts its sites from 0 up; a part of another kind that draws takes negative numbers, which never meet them.
    """
    key = ctx.key_B[:, None]
    low, high = key & _MASK, (key >> 32) & _MASK
    place = _mix(_mix(_mix(low ^ (ctx.positions_BT & _MASK)) ^ high) ^ (site * 0x9E3779B1 + ctx.tick & _MASK))
    lane = torch.arange(lanes, device=key.device, dtype=torch.int64)
    mixed = _mix(place[:, :, None] ^ _mix(lane + 0x2545F491))
    return (mixed >> 8).to(torch.float32) * 2.0**-24


class Dropout(nn.Module):
    """Inverted dropout whose mask comes from the context's key. ``site`` is set by the model that holds it."""

    site = 0

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x_BTD
        keep_BTD = uniform(ctx, self.site, x_BTD.shape[-1]) >= self.rate
        return x_BTD * keep_BTD.to(x_BTD.dtype) / (1.0 - self.rate)
