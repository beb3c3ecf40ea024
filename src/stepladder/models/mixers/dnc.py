"""The differentiable neural computer as a mixer (Graves et al., 2016, "Hybrid computing using a neural network with
dynamic external memory", Methods).

A controller (an LSTM) writes N slots of width M with one head and reads them with R. It knows which slots are in
use, and in which order they were written. At a token (all that the heads are told is one linear map of h_t):

    h_t = LSTM([x_t; r_{t-1}])
    psi = prod_i (1 - f_i w^{r,i}_{t-1})                  u_t = (u_{t-1} + w^w_{t-1} - u_{t-1} w^w_{t-1}) psi
    a_t: slots sorted by usage, least first               a[s_j] = (1 - u[s_j]) prod_{i<j} u[s_i]
    w^w = g^w (g^a a + (1 - g^a) content(k^w, M_{t-1}))   M_t = M_{t-1} (1 - w^w e^T) + w^w v^T
    L_t[i,j] = (1 - w_i - w_j) L_{t-1}[i,j] + w_i p_{t-1}[j], 0 where i = j       p_t = (1 - sum w^w) p_{t-1} + w^w
    w^{r,i} = pi_1 L_t^T w^{r,i}_{t-1} + pi_2 content(k^{r,i}, M_t) + pi_3 L_t w^{r,i}_{t-1}
    r_t = w^r M_t                                         y_t = out([h_t; r_t])

M_0 is learned; all else is 0 before a document's first token. The order of slots is a constant to the gradient, as
in the paper; slots of equal usage keep their order. TINY is added to usages in the product, so that its slope
divides by no 0. Two implementations of the loop over tokens: ``naive``, differentiated by autograd, and ``fused``,
both passes written out (kernels.dnc).

Suffixes: B batch, T tokens, D model width, H inner width (controller), G = 4H gates, R read heads, N slots (I the same,
as the first axis of links), M slot width, S what the heads are told.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.models.addressing import TINY, content
from stepladder.models.base import Context, Cost, Part, State, map_state
from stepladder.models.kernels import dnc as kernel
from stepladder.models.kernels.dnc_forms import told_sizes
from stepladder.models.layers import linear, no_autocast
from stepladder.models.mixers.lstm import Scan, cell, gate_bias, zeros


@dataclass(frozen=True)
class Carried:
    """All of the machine after the last token, float32 or wider: controller, reads (B, R, M), memory, usage, the write
    head's weights, precedence, links (written after, written before), the read heads' weights."""

    h_BH: Tensor
    c_BH: Tensor
    r_BRM: Tensor
    memory_BNM: Tensor
    usage_BN: Tensor
    write_BN: Tensor
    recent_BN: Tensor
    links_BIN: Tensor
    read_BRN: Tensor


class DNC(Part):
    """out([h_t; r_t]) of the machine above. Source and differences: zoo.dnc. ``gain`` scales the initial output map."""

    def __init__(
        self, width: int, inner: int, *, slots: int, slot_width: int, reads: int, scan: Scan, chunk: int, gain: float
    ) -> None:
        super().__init__()
        self.inner, self.reads, self.scan, self.chunk = inner, reads, scan, chunk
        self.site = 0  # which of a model's parts this is; names what it notes
        self.sizes = told_sizes(reads, slot_width)
        read = reads * slot_width
        self.project, self.recur = linear(width, 4 * inner), linear(inner + read, 4 * inner)
        self.bias = gate_bias(inner)
        self.tell, self.tell_bias = linear(inner, sum(self.sizes)), nn.Parameter(torch.zeros(sum(self.sizes)))
        self.memory_NM = nn.Parameter(0.1 * torch.randn(slots, slot_width))
        self.out = linear(inner + read, width, gain)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        if state is None:
            state = self.init_state(len(x_BTD), 0, x_BTD.device, x_BTD.dtype, None)
        run = self._naive if self.scan == "naive" else self._fused
        y_TBF, notes, after = run(x_BTD, state, ctx)
        for name, each in zip(("read", "write", "usage"), notes, strict=True):
            ctx.note(f"dnc{self.site}.{name}", each.transpose(0, 1))
        return self.out(y_TBF.to(self.out.weight.dtype)).transpose(0, 1), after

    def _naive(self, x_BTD: Tensor, state: Carried, ctx: Context) -> tuple[Tensor, tuple[Tensor, ...], Carried]:
        """The equations as they are written, token by token."""
        found, wide = [], state.c_BH.dtype
        for x_BD, position_B in zip(x_BTD.unbind(1), ctx.positions_BT.unbind(1), strict=True):
            heard_BG = F.linear(x_BD, self.project.weight, self.bias).to(wide)
            with no_autocast(x_BD.device):
                state = self._token(heard_BG, self._begun(state, position_B == 0))
            found.append(state)
        y_TBF = torch.stack([torch.cat((each.h_BH, each.r_BRM.flatten(1)), dim=-1) for each in found])
        read, write, usage = (
            torch.stack([getattr(each, name) for each in found]) for name in ("read_BRN", "write_BN", "usage_BN")
        )
        return y_TBF, (read, write[:, :, None], usage), state

    def _fused(self, x_BTD: Tensor, state: Carried, ctx: Context) -> tuple[Tensor, tuple[Tensor, ...], Carried]:
        wide, inner = state.c_BH.dtype, self.inner
        x_TBG = F.linear(x_BTD.transpose(0, 1), self.project.weight, self.bias).to(wide)
        maps = (each.to(wide) for each in (self.recur.weight, self.tell.weight, self.tell_bias, self.memory_NM))
        h_BH, c_BH, r_BRM, *machine = (getattr(state, each.name) for each in fields(state))
        past_BF = torch.cat((h_BH, r_BRM.flatten(1)), dim=-1)
        found = x_TBG, *maps, ctx.positions_BT.t() == 0, past_BF, c_BH, *machine
        with no_autocast(x_BTD.device):
            made = kernel.dnc(kernel.Given._make(found), self.chunk)
        h_BH, r_BF = made.y_TBF[-1].split((inner, self.reads * self.memory_NM.shape[1]), dim=-1)
        after = Carried(h_BH, made.c_BH, r_BF.unflatten(-1, (self.reads, -1)), *made[2:8])
        return made.y_TBF, (made.read_TBRN, made.write_TBN[:, :, None], made.usage_TBN), after

    def _begun(self, state: Carried, new_B: Tensor) -> Carried:
        """The state as a token finds it: afresh where a document begins, whatever the last one left behind."""
        old = map_state(lambda leaf: leaf.masked_fill(new_B.view(-1, *(1,) * (leaf.dim() - 1)), 0.0), state)
        memory_NM = self.memory_NM.to(old.memory_BNM.dtype)
        memory_BNM = torch.where(new_B[:, None, None], memory_NM, old.memory_BNM)
        return Carried(**{**vars(old), "memory_BNM": memory_BNM})

    def _token(self, heard_BG: Tensor, before: Carried) -> Carried:
        """One transition of the machine."""
        recur, tell, bias = (each.to(heard_BG.dtype) for each in (self.recur.weight, self.tell.weight, self.tell_bias))
        seen_BF = torch.cat((before.h_BH, before.r_BRM.flatten(1)), dim=-1)
        h_BH, c_BH = cell(heard_BG + F.linear(seen_BF, recur), before.c_BH)
        told = F.linear(h_BH, tell, bias).split(self.sizes, dim=-1)
        free, allocate, gate, erase = (each.sigmoid() for each in told[:4])
        strengths, vector_BM = 1 + F.softplus(told[4]), told[7]
        modes_BR3, keys = (
            told[5].unflatten(-1, (self.reads, 3)).softmax(-1),
            told[6].unflatten(-1, (1 + self.reads, -1)),
        )

        kept_BN = (1 - free[..., None] * before.read_BRN).prod(1)
        usage_BN = (before.usage_BN + before.write_BN - before.usage_BN * before.write_BN) * kept_BN
        similar_BN = content(keys[:, :1], strengths[:, :1], before.memory_BNM)[:, 0]
        write_BN = gate * torch.lerp(similar_BN, allocation(usage_BN), allocate)
        memory_BNM = before.memory_BNM * (1 - write_BN[..., None] * erase[:, None])
        memory_BNM = memory_BNM + write_BN[..., None] @ vector_BM[:, None]
        links_BIN = link(before.links_BIN, write_BN, before.recent_BN)
        recent_BN = (1 - write_BN.sum(-1, keepdim=True)) * before.recent_BN + write_BN

        forward_BRN, backward_BRN = before.read_BRN @ links_BIN.mT, before.read_BRN @ links_BIN
        ways = backward_BRN, content(keys[:, 1:], strengths[:, 1:], memory_BNM), forward_BRN
        read_BRN = sum((modes_BR3[..., way, None] * w for way, w in enumerate(ways)), torch.zeros_like(backward_BRN))
        return Carried(
            h_BH, c_BH, read_BRN @ memory_BNM, memory_BNM, usage_BN, write_BN, recent_BN, links_BIN, read_BRN
        )

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        """The state does not grow, so ``capacity`` means nothing here. The first token puts the learned memory in."""
        slots, slot_width = self.memory_NM.shape
        shapes = [(self.inner,)] * 2 + [(self.reads, slot_width), (slots, slot_width)] + [(slots,)] * 3
        return Carried(*zeros(batch, [*shapes, (slots, slots), (self.reads, slots)], device, dtype))

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """The maps, and per token the products of heads with memory (compare, write, read) and links (both ways)."""
        (slots, slot_width), reads = self.memory_NM.shape, self.reads
        matrices = sum(each.weight.numel() for each in (self.project, self.recur, self.tell, self.out))
        memory = slots * slot_width * (1 + reads + 1 + reads) + 2 * reads * slots * slots
        state = 2 * self.inner + reads * slot_width + slots * (slot_width + 3 + slots + reads)
        return Cost(self.own_params(), 2 * (matrices + memory), state * max(4, self.itemsize()))


def allocation(usage_BN: Tensor) -> Tensor:
    """Weights on free slots: sorted by usage, least first, each gets 1 - usage times the usages of those before it."""
    sorted_BN, order_BN = usage_BN.sort(dim=-1, stable=True)
    through_BN = (sorted_BN + TINY).cumprod(-1)
    before_BN = F.pad(through_BN[:, :-1], (1, 0), value=1.0)
    return torch.zeros_like(usage_BN).scatter(-1, order_BN, (1 - sorted_BN) * before_BN)


def link(links_BIN: Tensor, write_BN: Tensor, recent_BN: Tensor) -> Tensor:
    """L[i, j]: how much slot i was written right after slot j. Nothing follows itself."""
    to_BI1, from_B1N = write_BN[:, :, None], write_BN[:, None]
    links_BIN = (1 - to_BI1 - from_B1N) * links_BIN + to_BI1 * recent_BN[:, None]
    return links_BIN * (1 - torch.eye(links_BIN.shape[-1], dtype=links_BIN.dtype, device=links_BIN.device))
