"""Products of decays within a chunk of tokens, and a short causal convolution: both begin afresh at every document.

Suffixes: B batch, T tokens, U channels, L lags.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.models.base import Context


def running_sum(x: Tensor, document: Tensor) -> Tensor:
    """Running sums along the last axis of ``document`` (x has one more), begun afresh at every document.

    By doubling strides, not as differences of sums over everything: what a document's neighbours hold must not reach
    it even by rounding. Sums are as exact as a tree's.
    """
    axis, stride = document.dim() - 1, 1
    while stride < document.shape[-1]:
        rest = document.shape[-1] - stride
        same = document.narrow(-1, stride, rest) == document.narrow(-1, 0, rest)
        earlier = x.narrow(axis, 0, rest).masked_fill(~same[..., None], 0.0)
        x = torch.cat((x.narrow(axis, 0, stride), x.narrow(axis, stride, rest) + earlier), dim=axis)
        stride *= 2
    return x


def decay(logarithm: Tensor, kept: Tensor) -> Tensor:
    """exp where ``kept``, else 0, with a zero gradient there: masked before the exponential, where it may overflow."""
    return logarithm.masked_fill(~kept, -torch.inf).exp()


def convolved(u_BTU: Tensor, past_BLU: Tensor, weight_LU: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    """silu of a causal depthwise convolution, as a sum of shifted products; and the last L inputs, to carry on.

    weight: L + 1 taps, the token's own first. past_BLU: the inputs before the call. Documents hear nothing of others.
    """
    tokens, lags = u_BTU.shape[1], past_BLU.shape[1]
    full = torch.cat((past_BLU.to(u_BTU.dtype), u_BTU), dim=1)
    y_BTU = u_BTU * weight_LU[0]
    for lag in range(1, lags + 1):
        shifted = full[:, lags - lag : lags - lag + tokens]
        if ctx.packed:  # else positions are 0..T-1 and what precedes them is zeros
            shifted = shifted.masked_fill((ctx.positions_BT < lag)[..., None], 0.0)
        y_BTU = y_BTU + shifted * weight_LU[lag]
    return F.silu(y_BTU), full[:, tokens:]


class ShortConvolution(nn.Module):
    """silu of a causal depthwise convolution over ``taps`` tokens of the same document; 1 sees the token alone."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(taps, channels).uniform_(-1, 1) * math.sqrt(3 / taps))

    def forward(self, u_BTU: Tensor, past_BLU: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor]:
        """The result, and the last inputs to carry on (B, taps - 1, U); ``past`` None = start of a sequence."""
        past_BLU = self.start(len(u_BTU), u_BTU.device, u_BTU.dtype) if past_BLU is None else past_BLU
        return convolved(u_BTU, past_BLU, self.weight, ctx)

    def start(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Nothing seen yet."""
        return torch.zeros(batch, len(self.weight) - 1, self.weight.shape[1], device=device, dtype=dtype)
