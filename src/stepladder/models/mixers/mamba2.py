"""Mamba-2: a state-space mixer with one scalar decay a head (Dao & Gu, 2024, "Transformers are SSMs").

Per head, with x_t in R^P, B_t and C_t in R^N, a step dt_t > 0 and a rate A > 0:

    a_t = exp(-dt_t A)      S_t = a_t S_{t-1} + dt_t x_t B_t^T      y_t = S_t C_t + D x_t

At a document's first token S_{t-1} is 0 and the convolution sees nothing before it. Two implementations: ``naive``
is the recurrence, a loop over tokens; ``chunked`` is the same function in matrix products (the paper's section 6).

``A_log``, ``dt_bias`` and ``D`` keep the paper's names: A = exp(A_log), dt = softplus(projection + dt_bias).

Suffixes: B batch, T tokens, D model width, H heads, P head width, G groups of heads that share B and C, R heads of
a group, N state, U channels of the convolution, C chunks, Q tokens of a chunk (I and J: of the reader, the writer).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.fast.decay import convolved, decay, running_sum
from stepladder.models.layers import linear, no_autocast, norm

SPAN = 64
"""Chunks that are scanned at once. Their states meet in a SPAN x SPAN matrix, so this keeps the cost linear in T."""

DT_RANGE, RATE_RANGE = (1e-3, 1e-1), (1.0, 16.0)
"""Initial steps (log-uniform) and rates A (uniform): the paper's."""


@dataclass(frozen=True)
class Carried:
    """What a sequence carries: the last inputs of the convolution, and the state in float32 or wider."""

    inputs_BKU: Tensor
    state_BHPN: Tensor


class Mamba2(Part):
    """out( norm( y * silu z ) ), y from the recurrence over (x, B, C) = silu(conv(...)); all projected from the input.

    ``inner`` is the width of x, y and z, in heads of ``head_width``; ``conv`` the tokens that the convolution sees;
    ``scan`` the implementation. Source and differences: zoo.ssm. ``gain`` scales the initial output map.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        head_width: int,
        groups: int,
        state: int,
        conv: int,
        scan: Literal["chunked", "naive"],
        chunk: int,
        gain: float,
    ) -> None:
        super().__init__()
        heads = inner // head_width
        if inner % head_width or heads % groups:
            raise UserError(
                f"heads of width {head_width} do not divide the inner width {inner}, or {groups} groups do not divide "
                f"{heads} heads; choose divisors"
            )
        self.inner, self.heads, self.head_width, self.groups, self.state = inner, heads, head_width, groups, state
        self.scan, self.chunk = scan, chunk
        self.channels = inner + 2 * groups * state
        self.project = linear(width, inner + self.channels + heads)
        self.conv = nn.Parameter(torch.empty(conv, self.channels).uniform_(-1, 1) / math.sqrt(conv))
        # One number a head, so vectors: the optimizer's rule that vectors do not decay is what these need.
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*RATE_RANGE).log())
        step_H = torch.empty(heads).uniform_(*map(math.log, DT_RANGE)).exp()
        self.dt_bias = nn.Parameter(step_H + torch.log(-torch.expm1(-step_H)))  # the inverse of softplus
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = norm(inner)
        self.out = linear(inner, width, gain)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        batch, tokens, _ = x_BTD.shape
        gate, u_BTU, step = self.project(x_BTD).split((self.inner, self.channels, self.heads), dim=-1)
        wide = torch.promote_types(step.dtype, torch.float32)
        carried = self._start(batch, u_BTU.device, u_BTU.dtype) if state is None else state

        mixed_BTU, inputs_BKU = convolved(u_BTU, carried.inputs_BKU, self.conv, ctx)
        shared = self.groups * self.state
        x, b, c = mixed_BTU.split((self.inner, shared, shared), dim=-1)
        x_BTHP = x.view(batch, tokens, self.heads, self.head_width)
        b_BTGN, c_BTGN = (each.view(batch, tokens, self.groups, self.state) for each in (b, c))
        step_BTH = F.softplus(step.to(wide) + self.dt_bias.to(wide))
        log_decay_BTH = -step_BTH * self.A_log.to(wide).exp()
        reset_BT = ctx.positions_BT == 0
        # A fill, not a product: whatever a finished document left behind, be it infinite, is gone.
        before_BHPN = carried.state_BHPN.masked_fill(reset_BT[:, 0, None, None, None], 0.0)

        u_BTHP = (step_BTH[..., None] * x_BTHP).to(x_BTHP.dtype)
        inputs = (u_BTHP, log_decay_BTH, b_BTGN, c_BTGN, reset_BT, before_BHPN)
        with no_autocast(x_BTD.device):  # states are summed in float32 whatever the other products are made in
            y_BTHP, after_BHPN = naive(*inputs) if self.scan == "naive" else chunked(*inputs, self.chunk)
        y_BTE = (y_BTHP + self.D[:, None] * x_BTHP).flatten(2) * F.silu(gate)
        return self.out(self.norm(y_BTE.to(self.norm.weight.dtype))), Carried(inputs_BKU, after_BHPN)

    def _start(self, batch: int, device: torch.device, dtype: torch.dtype) -> Carried:
        wide = torch.promote_types(dtype, torch.float32)
        return Carried(
            torch.zeros(batch, len(self.conv) - 1, self.channels, device=device, dtype=dtype),
            torch.zeros(batch, self.heads, self.head_width, self.state, device=device, dtype=wide),
        )

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        """The state does not grow, so ``capacity`` means nothing here."""
        return self._start(batch, device, dtype)

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """Matrix products of the implementation in use; the convolution and all decays are elementwise, so 0."""
        matrices = self.project.weight.numel() + self.out.weight.numel()
        held = self.heads * self.head_width * self.state
        pairs = self.groups * self.state + self.inner  # of a pair of tokens: C B^T, and its product with dt x
        scan = 0
        for count, size in spans(context, self.chunk):
            if self.scan == "naive" or count * size == 1:
                scan += 2 * count * size * held  # S_t C_t
            else:
                scan += count * (2 * size * size * pairs + 4 * size * held) + 2 * (count + 1) ** 2 * held
        carried = (len(self.conv) - 1) * self.channels * self.itemsize() + held * max(4, self.itemsize())
        return Cost(self.own_params(), 2 * matrices + scan / context, carried)


def naive(
    u_BTHP: Tensor, log_decay_BTH: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, reset_BT: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, token by token: y without the skip (B, T, H, P), and the last state.

    u = dt x. log_decay_BTH: log a_t = -dt A, float32 or wider. reset_BT: where S_{t-1} counts as 0. state_BHPN: the
    state before the first token, float32 or wider, as all states are.
    """
    heads = u_BTHP.shape[2] // b_BTGN.shape[2]
    found = []
    for t in range(u_BTHP.shape[1]):
        b_BHN, c_BHN = (each[:, t].repeat_interleave(heads, dim=1).to(state_BHPN.dtype) for each in (b_BTGN, c_BTGN))
        decay_BH = log_decay_BTH[:, t].exp().masked_fill(reset_BT[:, t, None], 0.0)
        state_BHPN = decay_BH[..., None, None] * state_BHPN + u_BTHP[:, t, :, :, None] * b_BHN[:, :, None]
        found.append(torch.einsum("bhpn,bhn->bhp", state_BHPN, c_BHN))
    return torch.stack(found, dim=1), state_BHPN


def spans(tokens: int, chunk: int) -> Iterator[tuple[int, int]]:
    """How ``chunked`` cuts a sequence: (chunks, tokens of each) of every span. What is left over is a shorter chunk.

    So nothing is ever padded, and the cost of a token stays bounded however long the sequence.
    """
    whole, rest = divmod(tokens, chunk)
    for first in range(0, whole, SPAN):
        yield min(SPAN, whole - first), chunk
    if rest:
        yield 1, rest


def chunked(
    u_BTHP: Tensor,
    log_decay_BTH: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    reset_BT: Tensor,
    state_BHPN: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """What ``naive`` computes, in matrix products over chunks of ``chunk`` tokens; a token alone is left to it."""
    found, first = [], 0
    for count, size in spans(u_BTHP.shape[1], chunk):
        place = slice(first, first + count * size)
        u, log_decay, b, c, reset = (each[:, place] for each in (u_BTHP, log_decay_BTH, b_BTGN, c_BTGN, reset_BT))
        if count * size == 1:
            y_BTHP, state_BHPN = naive(u, log_decay, b, c, reset, state_BHPN)
        else:
            y_BTHP, state_BHPN = _span(u, log_decay, b, c, reset, state_BHPN, (count, size))
        found.append(y_BTHP)
        first = place.stop
    return torch.cat(found, dim=1) if len(found) > 1 else found[0], state_BHPN


def _span(
    u: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    reset_BT: Tensor,
    before_BHPN: Tensor,
    shape: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """One span of ``shape`` (chunks, tokens of each), in four products.

    The decay from token j to token i is exp(l_i - l_j), l the running sum of log decays within chunk and document;
    it is 0 if a document begins in between, that is, if the number of resets so far differs. Such pairs, and those
    with j after i, are masked before the exponential, where they might overflow: their gradient is 0.
    """
    groups, narrow, wide = b.shape[2], u.dtype, before_BHPN.dtype
    u, b, c = u.unflatten(1, shape).unflatten(3, (groups, -1)), b.unflatten(1, shape), c.unflatten(1, shape)
    document_BCQ = reset_BT.cumsum(1).unflatten(1, shape)
    l_BCQH = running_sum(log_decay.unflatten(1, shape), document_BCQ)
    # The document in force where each chunk begins, and after the last one; at the start no document has begun.
    border_BC = F.pad(document_BCQ[:, :, -1], (1, 0))

    # Within a chunk: attention without a softmax, (C B^T * decay) u.
    l_BCHQ = l_BCQH.transpose(2, 3)
    seen_BCIJ = (document_BCQ[..., None] == document_BCQ[:, :, None]).tril()
    weight = decay(l_BCHQ[..., None] - l_BCHQ[:, :, :, None], seen_BCIJ[:, :, None])
    scores = torch.einsum("bcign,bcjgn->bcgij", c, b)[:, :, :, None] * weight.unflatten(2, (groups, -1))
    y = torch.einsum("bcgrij,bcjgrp->bcigrp", scores.to(narrow), u)

    # What every chunk adds to the state, as seen from its end.
    last = decay(l_BCQH[:, :, -1:] - l_BCQH, (document_BCQ == border_BC[:, 1:, None])[..., None])
    written = (last.unflatten(3, (groups, -1))[..., None] * u).to(narrow)
    added = torch.einsum("bcjgrp,bcjgn->bcgrpn", written, b).flatten(2, 3).to(wide)

    # The states between the chunks: a recurrence over chunks, as one product with a lower triangular matrix.
    total_BCH = running_sum(F.pad(l_BCQH[:, :, -1], (0, 0, 1, 0)), border_BC)
    linked_BCC = (border_BC[:, :, None] == border_BC[:, None]).tril()
    across = decay(total_BCH[:, :, None] - total_BCH[:, None], linked_BCC[..., None])
    states = torch.einsum("bcdh,bdhpn->bchpn", across, torch.cat((before_BHPN[:, None], added), dim=1))

    # What every token reads from the state before its chunk.
    first = decay(l_BCQH, (document_BCQ == border_BC[:, :-1, None])[..., None])
    read = torch.einsum("bcign,bcgrpn->bcigrp", c, states[:, :-1].to(narrow).unflatten(2, (groups, -1)))
    y = y + first.unflatten(3, (groups, -1))[..., None] * read
    return y.flatten(3, 4).flatten(1, 2), states[:, -1]
