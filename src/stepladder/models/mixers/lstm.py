"""Long short-term memory as a mixer (Hochreiter & Schmidhuber, 1997; forget gates: Gers et al., 2000).

    i, f, o = sigmoid(W x_t + U h_{t-1} + b)      g = tanh(W x_t + U h_{t-1} + b)      (rows of one matrix)
    c_t = f c_{t-1} + i g                         h_t = o tanh(c_t)

h and c are 0 before a document's first token. Two implementations: ``naive`` is the loop over tokens, differentiated by
autograd; ``fused`` is the same function with both passes written out (kernels.lstm).

Suffixes: B batch, T tokens, D model width, H inner width, G = 4H gates in the order i, f, o, g.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.kernels import lstm as kernel
from stepladder.models.layers import linear, no_autocast

Scan = Literal["fused", "naive"]
"""Which implementation of one function runs."""


@dataclass(frozen=True)
class Carried:
    """The output h and the cell c after the last token, float32 or wider."""

    h_BH: Tensor
    c_BH: Tensor


def gate_bias(inner: int) -> nn.Parameter:
    """0, but 1 for the forget gates: a cell keeps what it has until it learns to forget (Gers et al., 2000)."""
    bias_G = torch.zeros(4 * inner)
    bias_G[inner : 2 * inner] = 1.0
    return nn.Parameter(bias_G)


def cells_like_attention(width: int, read: int = 0, told: int = 0) -> int:
    """Cells, a multiple of 8, that give a mixer the parameters of attention, 4 width^2.

    read: numbers that a controller hears of its memory; told: numbers that it tells the heads. Then a swap of mixers
    leaves the rest of a block as it is.
    """
    each, rest = 5 * width + 4 * read + told, max(0, 4 * width * width - read * width)
    return max(8, round((math.sqrt(each * each + 16 * rest) - each) / 64) * 8)


def cell(gates_BG: Tensor, c_BH: Tensor) -> tuple[Tensor, Tensor]:
    """The next h and c from the gates before their nonlinearities."""
    i, f, o, g = gates_BG.chunk(4, dim=-1)
    c_BH = f.sigmoid() * c_BH + i.sigmoid() * g.tanh()
    return o.sigmoid() * c_BH.tanh(), c_BH


class LSTM(Part):
    """out(h_t): one layer of ``inner`` cells. ``scan`` chooses the implementation. Source and differences: zoo.lstm.

    ``gain`` scales the initial output map. Inside the recurrence all numbers are float32 or wider.
    """

    def __init__(self, width: int, inner: int, scan: Scan, gain: float) -> None:
        super().__init__()
        self.inner, self.scan = inner, scan
        self.project, self.recur = linear(width, 4 * inner), linear(inner, 4 * inner)
        self.bias = gate_bias(inner)
        self.out = linear(inner, width, gain)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        if state is None:
            state = self.init_state(len(x_BTD), 0, x_BTD.device, x_BTD.dtype, None)
        run = self._naive if self.scan == "naive" else self._fused
        y_TBH, after = run(x_BTD, state, ctx)
        return self.out(y_TBH.to(self.out.weight.dtype)).transpose(0, 1), after

    def _naive(self, x_BTD: Tensor, state: Carried, ctx: Context) -> tuple[Tensor, Carried]:
        """The equations as they are written, token by token."""
        h_BH, c_BH, found = state.h_BH, state.c_BH, []
        for x_BD, position_B in zip(x_BTD.unbind(1), ctx.positions_BT.unbind(1), strict=True):
            # A fill, not a product: whatever a finished document left behind, be it infinite, is gone.
            h_BH, c_BH = (each.masked_fill(position_B[:, None] == 0, 0.0) for each in (h_BH, c_BH))
            heard_BG = F.linear(x_BD, self.project.weight, self.bias).to(h_BH.dtype)
            with no_autocast(x_BD.device):
                gates_BG = heard_BG + F.linear(h_BH, self.recur.weight.to(h_BH.dtype))
                h_BH, c_BH = cell(gates_BG, c_BH)
            found.append(h_BH)
        return torch.stack(found), Carried(h_BH, c_BH)

    def _fused(self, x_BTD: Tensor, state: Carried, ctx: Context) -> tuple[Tensor, Carried]:
        wide = state.c_BH.dtype
        x_TBG = F.linear(x_BTD.transpose(0, 1), self.project.weight, self.bias).to(wide)
        reset_TB = ctx.positions_BT.t() == 0
        with no_autocast(x_BTD.device):
            given = kernel.Given(x_TBG, self.recur.weight.to(wide), reset_TB, state.h_BH, state.c_BH)
            y_TBH, c_BH = kernel.lstm(given)
        return y_TBH, Carried(y_TBH[-1], c_BH)

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        """The state does not grow, so ``capacity`` means nothing here."""
        h, c = zeros(batch, [(self.inner,)] * 2, device, dtype)
        return Carried(h, c)

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """Of all three maps; the cell is elementwise, so 0."""
        return Cost(
            self.own_params(), 2 * (self.own_params() - len(self.bias)), 2 * self.inner * max(4, self.itemsize())
        )


def zeros(
    batch: int, shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Zeros (B, *shape) in float32 or wider: what recurrences are summed in."""
    wide = torch.promote_types(dtype, torch.float32)
    return tuple(torch.zeros(batch, *shape, device=device, dtype=wide) for shape in shapes)
