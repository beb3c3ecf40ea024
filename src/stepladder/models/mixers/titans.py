"""Titans' neural memory as a mixer (Behrouz, Zhong & Mirrokni, 2025): fast.fast_weights has the equations.

Suffixes: B batch, T tokens, D model width, H heads, K head width, L lags of the convolution, U its channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.fast.decay import ShortConvolution
from stepladder.models.fast.fast_weights import Memory
from stepladder.models.layers import linear, no_autocast, norm
from stepladder.models.mixers.neural_memory import FastMemory


@dataclass(frozen=True)
class Carried:
    """What a sequence carries: the last inputs of the convolution, and the memory in float32 or wider."""

    inputs_BLU: Tensor
    memory: Memory


class NeuralMemory(Part):
    """out( norm(y) * silu z ), y = M_t(q_t) per head; (q, k, v) = silu(conv(...)), q and k of length 1.

    Source and differences: zoo.titans. ``gain`` scales the initial output map.
    """

    site: int = 0

    def __init__(self, width: int, memory: FastMemory, conv: int, gain: float) -> None:
        super().__init__()
        inner = memory.heads * memory.head_width
        self.memory, self.conv = memory, ShortConvolution(3 * inner, conv)
        self.gate, self.norm, self.out = linear(width, inner), norm(memory.head_width), linear(inner, width, gain)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        u_BTU, told_BTG = self.memory.project(x_BTD).split(self.memory.sizes, dim=-1)
        qkv, inputs_BLU = self.conv(u_BTU, None if state is None else state.inputs_BLU, ctx)
        with no_autocast(x_BTD.device):  # a memory is kept in float32 whatever the other products are made in
            given, tokens = None if state is None else state.memory, self.memory.told(qkv, told_BTG)
            y_BHTK, memory = self.memory.run(tokens, given, ctx, f"memory{self.site}.norm")
        y_BTD = self.norm(y_BHTK.transpose(1, 2).to(self.norm.weight.dtype)).flatten(2)
        return self.out(y_BTD * F.silu(self.gate(x_BTD))), Carried(inputs_BLU, memory)

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        """The state does not grow, so ``capacity`` means nothing here."""
        return Carried(self.conv.start(batch, device, dtype), self.memory.start(batch, device, dtype))

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """One document in every row. A row of documents costs up to twice the memory's part (docs/nested.md)."""
        maps = sum(layer.weight.numel() for layer in (self.memory.project, self.gate, self.out))
        carried = (len(self.conv.weight) - 1) * self.memory.sizes[0] * self.itemsize()
        carried += self.memory.state_numbers() * max(4, self.itemsize())
        return Cost(self.own_params(), 2 * maps + self.memory.scan_flops(context) / context, carried)
