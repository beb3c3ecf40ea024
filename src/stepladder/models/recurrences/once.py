"""No recurrence: the core is applied once. The control of every experiment here."""

from __future__ import annotations

import torch
from torch import Tensor

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Cost, Part, State


class Once(Part):
    """Apply the core a single time; any other tick budget is refused, not ignored."""

    def __init__(self, core: Part) -> None:
        super().__init__()
        self.core = core

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        if ctx.ticks not in (None, 1):
            raise UserError(f"this architecture has no loop, so ticks={ctx.ticks} means nothing; leave ticks out")
        ctx.note("ticks", torch.ones_like(ctx.positions_BT))
        return self.core(x_BTD, state, ctx)

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        return self.core.init_state(batch, capacity, device, dtype, ticks)

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        return self.core.cost(context)
