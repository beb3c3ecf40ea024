"""Composition: the pre-norm residual around a part, and parts in a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from operator import add
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.layers import norm
from stepladder.models.noise import Dropout


class Residual(Part):
    """x + dropout(part(norm x)): the pre-norm residual around a mixer or a channel mixer."""

    def __init__(self, width: int, part: Part, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.part, self.dropout = norm(width), part, Dropout(dropout)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        y_BTD, state = self.part(self.norm(x_BTD), state, ctx)
        return x_BTD + self.dropout(y_BTD, ctx), state

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        return self.part.init_state(batch, capacity, device, dtype, ticks)

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        return Cost(self.norm.weight.numel()) + self.part.cost(context, ticks)


def apply(part: Part, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
    """``part(x_BTD, state, ctx)``; where the context says so, recomputed in the backward pass instead of kept."""
    if ctx.recompute and torch.is_grad_enabled():
        # The part is an argument, not a captured loop variable: recomputation must meet the same weights.
        return cast(
            tuple[Tensor, State], checkpoint(part, x_BTD, state, ctx, use_reentrant=False, preserve_rng_state=False)
        )
    return cast(tuple[Tensor, State], part(x_BTD, state, ctx))


class Stack(Part):
    """Parts one after the other; an empty stack passes its input through."""

    def __init__(self, parts: Iterable[Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def __iter__(self) -> Iterator[Part]:
        """The parts, in order."""
        return cast(Iterator[Part], iter(self.parts))

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        states = (None,) * len(self.parts) if state is None else state
        after = []
        for part, before in zip(self, states, strict=True):
            x_BTD, carried = apply(part, x_BTD, before, ctx)
            after.append(carried)
        return x_BTD, tuple(after)

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        return tuple(part.init_state(batch, capacity, device, dtype, ticks) for part in self)

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        return reduce(add, (part.cost(context, ticks) for part in self), Cost())
