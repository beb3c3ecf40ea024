"""The shared loop: one core, applied for a number of ticks chosen at the call."""

from __future__ import annotations

import torch
from torch import Tensor

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.layers import linear, norm


class Loop(Part):
    """h_0 = e; h_k = core( norm(h_{k-1}) + W e ), the same core and W at every tick (W e only with ``inject``).

    Source: Universal Transformer (Dehghani et al., 2019) and, for re-injection of the input at every tick so that
    the tick count can be raised at test time, Fan et al. 2024, "Looped transformers for length generalization".
    Differs from them in: a norm on the carried hidden state at every tick, a learned linear map on the re-injected
    input, no step embedding. Every tick keeps a state of its own (tick k attends to what tick k computed), so a
    sequence must be continued with the tick count it was begun with.
    """

    def __init__(self, core: Part, width: int, ticks: int, inject: bool) -> None:
        super().__init__()
        self.core, self.ticks = core, ticks
        self.norm = norm(width)
        self.inject = linear(width, width) if inject else None

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        ticks = self.ticks if ctx.ticks is None else ctx.ticks
        if ticks < 1:
            raise UserError(f"ticks={ticks}: a loop runs at least once; give ticks >= 1")
        states = (None,) * ticks if state is None else state
        if len(states) != ticks:
            raise UserError(
                f"this sequence was begun with {len(states)} ticks and cannot go on with {ticks}; "
                "start it again with the new tick count"
            )
        again_BTD = 0.0 if self.inject is None else self.inject(x_BTD)
        h_BTD, after = x_BTD, []
        for tick, before in enumerate(states):
            h_BTD, carried = self.core(self.norm(h_BTD) + again_BTD, before, ctx.at_tick(tick))
            after.append(carried)
        ctx.note("ticks", torch.full_like(ctx.positions_BT, ticks))
        return h_BTD, tuple(after)

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        count = self.ticks if ticks is None else ticks
        return tuple(self.core.init_state(batch, capacity, device, dtype, ticks) for _ in range(count))

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        own = Cost(self.norm.weight.numel())
        if self.inject is not None:
            own = own + Cost(self.inject.weight.numel(), 2 * self.inject.weight.numel())
        return own + self.core.cost(context, ticks).repeated(self.ticks if ticks is None else ticks)
