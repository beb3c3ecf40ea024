"""Attention from one stream to another, in halves: what is read is projected once, and read any number of times."""

from __future__ import annotations

from torch import Tensor, nn

from stepladder.models.layers import linear


class Cross(nn.Module):
    """The maps of multi-head cross-attention with grouped key/value heads; ``mixers.attention.attend`` joins them.

    N is any number of places; H query heads, G key/value heads of width K. ``gain`` scales the initial output map.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, gain: float) -> None:
        super().__init__()
        self.head_width = width // heads
        self.query = linear(width, width)
        self.pair = linear(width, 2 * kv_heads * self.head_width)
        self.out = linear(width, width, gain)

    def queries(self, x_ND: Tensor) -> Tensor:
        """(..., N, D) -> (..., N, H, K)."""
        return self.query(x_ND).unflatten(-1, (-1, self.head_width))

    def pairs(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values: (..., N, D) -> (..., N, G, K) twice."""
        k, v = self.pair(x_ND).unflatten(-1, (2, -1, self.head_width)).unbind(-3)
        return k, v

    def reader_flops(self) -> int:
        """Of the maps on the reader's side, for one reader."""
        return 2 * (self.query.weight.numel() + self.out.weight.numel())

    def pair_flops(self) -> int:
        """Of the keys and values of one place."""
        return 2 * self.pair.weight.numel()
