"""SwiGLU, the gated channel mixer (Shazeer, 2020, "GLU variants improve transformer", eq. 6)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.layers import linear


class SwiGLU(Part):
    """out( silu(gate x) * up x ), no biases; gate and up are one matrix."""

    def __init__(self, width: int, hidden: int, gain: float) -> None:
        super().__init__()
        self.up = linear(width, 2 * hidden)
        self.out = linear(hidden, width, gain)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        gate_BTF, up_BTF = self.up(x_BTD).chunk(2, dim=-1)
        return self.out(F.silu(gate_BTF) * up_BTF), None

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        return Cost(self.own_params(), 2 * self.own_params())
