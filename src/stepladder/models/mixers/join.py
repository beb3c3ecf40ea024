"""Two mixers made one: side by side with a gate (Titans' MAG), or one behind the other (Titans' MAL)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.layers import norm


def normed(layer: nn.RMSNorm, x: Tensor) -> Tensor:
    """norm(x) in the type of its weight: under mixed precision x comes narrower."""
    return cast(Tensor, layer(x.to(layer.weight.dtype)))


class Pair(Part):
    """Two parts and their states. A subclass says how they are joined."""

    def __init__(self, first: Part, second: Part) -> None:
        super().__init__()
        self.first, self.second = first, second

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        return tuple(part.init_state(batch, capacity, device, dtype, ticks) for part in (self.first, self.second))

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        parts = self.first.cost(context, ticks) + self.second.cost(context, ticks)
        return Cost(self.own_params(), parts.flops, parts.state_bytes)


class Gated(Pair):
    """norm(first x) * silu(norm(second x)): the second opens and closes the first, channel by channel.

    Source: Titans, section 4.2: both are normalised with learned vectors, a nonlinearity follows. ``gain`` scales the
    initial output.
    """

    def __init__(self, width: int, first: Part, second: Part, gain: float) -> None:
        super().__init__(first, second)
        self.norm, self.gate = norm(width), norm(width)
        nn.init.constant_(self.norm.weight, gain)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        before = (None, None) if state is None else state
        y_BTD, first = self.first(x_BTD, before[0], ctx)
        gate_BTD, second = self.second(x_BTD, before[1], ctx)
        return normed(self.norm, y_BTD) * F.silu(normed(self.gate, gate_BTD)), (first, second)


class Chain(Pair):
    """second(norm(first x)). Source: Titans, section 4.3."""

    def __init__(self, width: int, first: Part, second: Part) -> None:
        super().__init__(first, second)
        self.norm = norm(width)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        before = (None, None) if state is None else state
        y_BTD, first = self.first(x_BTD, before[0], ctx)
        y_BTD, second = self.second(normed(self.norm, y_BTD), before[1], ctx)
        return y_BTD, (first, second)
