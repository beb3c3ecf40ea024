"""The delta rule: a matrix memory that is corrected, not added to; with a decay, the gated delta rule.

Per head, with a key k_t of length 1, a value v_t, a query q_t of length 1, 0 < beta_t < 1 and 0 < a_t <= 1:

    S_t = a_t S_{t-1} + beta_t (v_t - a_t S_{t-1} k_t) k_t^T        y_t = S_t q_t

At a document's first token S_{t-1} is 0. ``naive`` is this recurrence, token by token. ``chunked`` is the same function
in matrix products: with g_t the product of the decays since the chunk's start and D[t, j] that of j + 1..t,

    S_t = g_t S_0 + sum_{j <= t} D[t, j] r_j k_j^T
    (I + diag(beta) (D * K K^T)_{j < t}) R = diag(beta) (V - diag(g) K S_0^T)

a triangular system whose matrix does not depend on S_0: solved for all chunks at once (the WY form), so that only the
states go from chunk to chunk. The chunks are not part of the function.

Suffixes: B batch, T tokens, D model width, H heads, K head width, C chunks, Q tokens of a chunk, V the axis of values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.fast.decay import ShortConvolution, decay, running_sum
from stepladder.models.layers import linear, no_autocast, norm

STEP_RANGE, RATE_RANGE = (1e-3, 1e-1), (1.0, 16.0)
"""Initial steps (log-uniform) and rates (uniform) of the decay: those of Mamba-2, as in Gated DeltaNet."""


@dataclass(frozen=True)
class Carried:
    """What a sequence carries: the last inputs of the convolution, and S in float32 or wider."""

    inputs_BLU: Tensor
    state_BHVK: Tensor


class Delta(Part):
    """out( norm(y) * silu z ), y from the recurrence over (q, k, v) = silu(conv(...)); all projected from the input.

    beta_t = sigmoid of a projection; a_t = exp(-rate softplus(projection + bias)) per head, or 1 without ``gated``.
    Source and differences: zoo.gated_deltanet. ``gain`` scales the initial output map.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        conv: int,
        gated: bool,
        scan: Literal["chunked", "naive"],
        chunk: int,
        gain: float,
    ) -> None:
        super().__init__()
        self.heads, self.head_width, self.scan, self.chunk = heads, head_width, scan, chunk
        inner = heads * head_width
        self.sizes = (3 * inner, inner, heads, heads if gated else 0)
        self.project = linear(width, sum(self.sizes))
        self.conv = ShortConvolution(3 * inner, conv)
        self.rate_log, self.step_bias = None, None
        if gated:
            self.rate_log = nn.Parameter(torch.empty(heads).uniform_(*RATE_RANGE).log())
            step_H = torch.empty(heads).uniform_(*map(math.log, STEP_RANGE)).exp()
            self.step_bias = nn.Parameter(step_H + torch.log(-torch.expm1(-step_H)))  # the inverse of softplus
        self.norm = norm(head_width)
        self.out = linear(inner, width, gain)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        qkv, gate, beta_BTH, step_BTH = self.project(x_BTD).split(self.sizes, dim=-1)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        carried = self._start(len(x_BTD), qkv.device, qkv.dtype) if state is None else state
        qkv, inputs_BLU = self.conv(qkv, carried.inputs_BLU, ctx)
        q, k, v = qkv.to(wide).unflatten(-1, (3, self.heads, self.head_width)).unbind(2)
        q, k, beta_BTH = F.normalize(q, dim=-1), F.normalize(k, dim=-1), beta_BTH.to(wide).sigmoid()
        log_decay_BTH = torch.zeros_like(beta_BTH)
        if self.rate_log is not None and self.step_bias is not None:
            log_decay_BTH = -F.softplus(step_BTH.to(wide) + self.step_bias.to(wide)) * self.rate_log.to(wide).exp()
        reset_BT = ctx.positions_BT == 0
        # A fill, not a product: whatever a finished document left behind, be it infinite, is gone.
        before_BHVK = carried.state_BHVK.masked_fill(reset_BT[:, 0, None, None, None], 0.0)
        given = (q, k, v, beta_BTH, log_decay_BTH, reset_BT, before_BHVK)
        with no_autocast(x_BTD.device):  # corrections of a float32 state, whatever the other products are made in
            y_BTHK, after_BHVK = naive(*given) if self.scan == "naive" else chunked(*given, self.chunk)
        y_BTHK = self.norm(y_BTHK.to(self.norm.weight.dtype)) * F.silu(gate).unflatten(-1, (self.heads, -1))
        return self.out(y_BTHK.flatten(2)), Carried(inputs_BLU, after_BHVK)

    def _start(self, batch: int, device: torch.device, dtype: torch.dtype) -> Carried:
        wide = torch.promote_types(dtype, torch.float32)
        shape = (batch, self.heads, self.head_width, self.head_width)
        return Carried(self.conv.start(batch, device, dtype), torch.zeros(shape, device=device, dtype=wide))

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        """The state does not grow, so ``capacity`` means nothing here."""
        return self._start(batch, device, dtype)

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """Matrix products of the implementation in use; solving the triangular systems is not counted by torch."""
        matrices, square = self.project.weight.numel() + self.out.weight.numel(), self.heads * self.head_width**2
        scan = 0
        for size, count in ((self.chunk, context // self.chunk), (context % self.chunk, 1)):
            if self.scan == "naive" or context == 1:
                scan += count * size * 4 * square
            else:
                scan += count * (6 * size * size * self.heads * self.head_width + 6 * size * square)
        carried = (len(self.conv.weight) - 1) * self.sizes[0] * self.itemsize() + square * max(4, self.itemsize())
        return Cost(self.own_params(), 2 * matrices + scan / context, carried)


def naive(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    beta_BTH: Tensor,
    log_decay_BTH: Tensor,
    reset_BT: Tensor,
    state_BHVK: Tensor,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, token by token: y (B, T, H, K), and the last state. All in one type."""
    found = []
    for t in range(q_BTHK.shape[1]):
        k_BHK, beta_BH = k_BTHK[:, t], beta_BTH[:, t, :, None]
        kept = log_decay_BTH[:, t].exp()[..., None, None] * state_BHVK
        kept = kept.masked_fill(reset_BT[:, t, None, None, None], 0.0)
        wrong_BHV = v_BTHK[:, t] - torch.einsum("bhvk,bhk->bhv", kept, k_BHK)
        state_BHVK = kept + (beta_BH * wrong_BHV)[..., None] * k_BHK[:, :, None]
        found.append(torch.einsum("bhvk,bhk->bhv", state_BHVK, q_BTHK[:, t]))
    return torch.stack(found, dim=1), state_BHVK


def chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    beta_BTH: Tensor,
    log_decay_BTH: Tensor,
    reset_BT: Tensor,
    state_BHVK: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """What ``naive`` computes, over chunks of ``chunk`` tokens; a shorter one is left over, and nothing is padded."""
    tokens = q_BTHK.shape[1]
    if tokens == 1:
        return naive(q_BTHK, k_BTHK, v_BTHK, beta_BTH, log_decay_BTH, reset_BT, state_BHVK)
    whole = tokens // chunk * chunk
    found = []
    for place, size in ((slice(0, whole), chunk), (slice(whole, tokens), tokens - whole)):
        if size and place.stop > place.start:
            given = (q_BTHK, k_BTHK, v_BTHK, beta_BTH, log_decay_BTH, reset_BT)
            q, k, v, beta, log_decay, reset = (each[:, place].unflatten(1, (-1, size)) for each in given)
            y_BTHK, state_BHVK = _chunks(q, k, v, beta, log_decay, reset, state_BHVK)
            found.append(y_BTHK)
    return torch.cat(found, dim=1) if len(found) > 1 else found[0], state_BHVK


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, reset_BCQ: Tensor, state_BHVK: Tensor
) -> tuple[Tensor, Tensor]:
    """Chunks of one size (B, C, Q, ...)."""
    document_BCQ = reset_BCQ.flatten(1).cumsum(1).view_as(reset_BCQ)
    border_BC = F.pad(document_BCQ[:, :, -1], (1, 0))[:, :-1]  # the document in force before each chunk
    q, k, v = (each.transpose(2, 3) for each in (q, k, v))  # (B, C, H, Q, K)
    l_BCHQ = running_sum(log_decay, document_BCQ).transpose(2, 3)
    beta_BCHQ1 = beta.transpose(2, 3)[..., None]

    # D[t, j] where j <= t in the same document; g_t, from the state before the chunk; from j to the chunk's end.
    seen_BCQQ = (document_BCQ[..., None] == document_BCQ[:, :, None]).tril()
    d = decay(l_BCHQ[..., None] - l_BCHQ[..., None, :], seen_BCQQ[:, :, None])
    g = decay(l_BCHQ, (document_BCQ == border_BC[..., None])[:, :, None])[..., None]
    last = d[..., -1, :, None]

    system = beta_BCHQ1 * (d * (k @ k.mT)).tril(-1)  # the unit diagonal is implied
    solved = torch.linalg.solve_triangular(
        system, torch.cat((beta_BCHQ1 * v, beta_BCHQ1 * g * k), dim=-1), upper=False, unitriangular=True
    )
    own, heard = solved.split(v.shape[-1], dim=-1)
    scores, written, read = d * (q @ k.mT), last * k, g * q
    found = []
    for c in range(q.shape[1]):
        r_BHQV = own[:, c] - heard[:, c] @ state_BHVK.mT
        found.append(read[:, c] @ state_BHVK.mT + scores[:, c] @ r_BHQV)
        state_BHVK = g[:, c, :, -1:] * state_BHVK + r_BHQV.mT @ written[:, c]
    return torch.stack(found, dim=1).transpose(2, 3).flatten(1, 2), state_BHVK
