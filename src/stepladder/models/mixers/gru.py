"""Gated recurrent units as a mixer (Cho et al., 2014).

    r, z = sigmoid(W x_t + U h_{t-1} + b)      n = tanh(W x_t + b + r (U h_{t-1} + c))      (rows of one matrix)
    h_t = (1 - z) n + z h_{t-1}

h is 0 before a document's first token. The reset gate r stands behind the product, as in torch and cuDNN; in the paper
it stands before it. Two implementations: ``naive`` is the loop over tokens, differentiated by autograd; ``fused``
is the same function with both passes written out (kernels.gru).

Suffixes: B batch, T tokens, D model width, H inner width, G = 3H gates in the order r, z, n.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.kernels import gru as kernel
from stepladder.models.layers import linear, no_autocast
from stepladder.models.mixers.lstm import Scan, zeros


def units_like_attention(width: int) -> int:
    """Units, a multiple of 8, that give the mixer the parameters of attention: 4 H width + 3 H^2 = 4 width^2."""
    return max(8, round(2 * width / 3 / 8) * 8)


class GRU(Part):
    """out(h_t): one layer of ``inner`` units. ``scan`` chooses the implementation.

    ``gain`` scales the initial output map. Inside the recurrence all numbers are float32 or wider.
    """

    def __init__(self, width: int, inner: int, scan: Scan, gain: float) -> None:
        super().__init__()
        self.inner, self.scan = inner, scan
        self.project, self.recur = linear(width, 3 * inner), linear(inner, 3 * inner)
        self.bias, self.past_bias = nn.Parameter(torch.zeros(3 * inner)), nn.Parameter(torch.zeros(inner))
        self.out = linear(inner, width, gain)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        if state is None:
            state = self.init_state(len(x_BTD), 0, x_BTD.device, x_BTD.dtype, None)
        x_TBG = F.linear(x_BTD.transpose(0, 1), self.project.weight, self.bias).to(state.dtype)
        reset_TB = ctx.positions_BT.t() == 0
        with no_autocast(x_BTD.device):
            weight_GH, bias_H = self.recur.weight.to(state.dtype), self.past_bias.to(state.dtype)
            given = kernel.Given(x_TBG, weight_GH, bias_H, reset_TB, state)
            y_TBH = naive(given) if self.scan == "naive" else kernel.gru(given)
        # Cloned: a state that is a view would keep all of y alive.
        return self.out(y_TBH.to(self.out.weight.dtype)).transpose(0, 1), y_TBH[-1].clone()

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        """The state, h, does not grow, so ``capacity`` means nothing here."""
        return zeros(batch, [(self.inner,)], device, dtype)[0]

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """Of all three maps; the gates are elementwise, so 0."""
        products = self.own_params() - len(self.bias) - len(self.past_bias)
        return Cost(self.own_params(), 2 * products, self.inner * max(4, self.itemsize()))


def naive(given: kernel.Given) -> Tensor:
    """The equations as they are written, token by token: all h (T, B, H)."""
    h_BH, found = given.h_BH, []
    for x_BG, reset_B in zip(given.x_TBG.unbind(0), given.reset_TB.unbind(0), strict=True):
        # A fill, not a product: whatever a finished document left behind, be it infinite, is gone.
        h_BH = h_BH.masked_fill(reset_B[:, None], 0.0)
        (r, z, n), (past_r, past_z, past_n) = x_BG.chunk(3, 1), F.linear(h_BH, given.weight_GH).chunk(3, 1)
        r, z = (r + past_r).sigmoid(), (z + past_z).sigmoid()
        h_BH = (1 - z) * (n + r * (past_n + given.bias_H)).tanh() + z * h_BH
        found.append(h_BH)
    return torch.stack(found)
