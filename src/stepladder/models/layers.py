"""The small layers that parts share: linear maps with a stated initial scale, embeddings, rotary positions."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Cost

NORM_EPS = 1e-6


def norm(width: int) -> nn.RMSNorm:
    """Root-mean-square normalisation (Zhang & Sennrich, 2019), statistics in float32 under mixed precision."""
    return nn.RMSNorm(width, eps=NORM_EPS)


def linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """A bias-free linear map with N(0, gain^2 / inputs) weights, so unit inputs give outputs of scale ``gain``."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs))
    return layer


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, products are made in the type of what is multiplied, whatever the call's compute type."""
    # "meta", where shapes are worked out, knows no autocast; asking torch which devices do breaks compiled graphs.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def residual_gain(depth: int) -> float:
    """Gain of maps that write to the residual stream: 1/sqrt(2 x effective depth), unrolled ticks counted."""
    return 1.0 / math.sqrt(2 * max(depth, 1))


class Embedding(nn.Module):
    """Token embeddings of unit scale, with learned absolute positions if ``positions`` > 0.

    A document longer than the learned positions is an error. A tied weight also makes the logits, which must start
    small, so it is kept at 1/4 of 1/sqrt(width) and scaled up to unit size on the way in.
    """

    def __init__(self, vocab: int, width: int, positions: int = 0, tied: bool = False) -> None:
        super().__init__()
        std = 0.25 / math.sqrt(width) if tied else 1.0
        self.scale = 1.0 / std
        self.tokens = nn.Embedding(vocab, width)
        nn.init.normal_(self.tokens.weight, std=std)
        self.positions = nn.Embedding(positions, width) if positions else None
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.1)

    def forward(self, ctx: Context, placed: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Embeddings of the tokens; those of ``placed``, a mask (B, T) and (B, T, D), instead where the mask is."""
        x_BTD = self.tokens(ctx.tokens_BT) * self.scale
        if placed is not None:
            x_BTD = torch.where(placed[0][:, :, None], placed[1], x_BTD)
        if self.positions is None:
            return x_BTD
        if not torch.compiler.is_compiling():
            longest = int(ctx.positions_BT.max()) + 1
            if longest > self.positions.num_embeddings:
                raise UserError(
                    f"a document of {longest} tokens does not fit the {self.positions.num_embeddings} learned "
                    "positions; raise model.max_positions or use positions: rope"
                )
        return x_BTD + self.positions(ctx.positions_BT)

    def cost(self) -> Cost:
        """Look-ups are no matrix products."""
        return Cost(params=sum(p.numel() for p in self.parameters()))


def rotate(x_BHTK: Tensor, positions_BT: Tensor, base: float) -> Tensor:
    """Rotary position embedding (Su et al., 2021), half-split convention, angles in float32 or wider.

    Channel pairs (i, i + K/2) turn by position x base^(-2i/K). Angles are built from the head width itself.
    """
    cos, sin = angles(positions_BT, x_BHTK.shape[-1], base, x_BHTK.dtype)
    return turn(x_BHTK, cos[:, None], sin[:, None])


def angles(positions_BT: Tensor, head_width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, K/2) of rotary positions, in float32 or wider."""
    half, wide = head_width // 2, torch.promote_types(dtype, torch.float32)
    speeds = base ** (-torch.arange(half, device=positions_BT.device, dtype=wide) / half)
    turns = positions_BT[..., None].to(wide) * speeds
    return turns.cos(), turns.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel pairs (i, i + K/2) of x (..., K) turned; cosines and sines broadcast against (..., K/2)."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
