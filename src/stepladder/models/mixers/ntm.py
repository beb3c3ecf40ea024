"""The neural Turing machine as a mixer (Graves, Wayne & Danihelka, 2014, "Neural Turing machines").

A controller (an LSTM) reads and writes N slots of width M through heads that each hold a weight per slot. At a token:

    h_t = LSTM([x_t; r_{t-1}])                      what every head is told is one linear map of h_t
    u_i = cosine(k, M_{t-1}(i))                     w^c = softmax(beta u)                                 (5), (6)
    w^g = g w^c + (1 - g) w_{t-1}                   w~_i = sum_j w^g_{i-j} s_j, circular                  (7), (8)
    w_t = w~^gamma / sum w~^gamma                                                                         (9)
    M_t = M_{t-1} prod_v (1 - w_v e_v^T) + sum_v w_v a_v^T    over the write heads v                      (3), (4)
    r_t = w_t M_t    for every read head            y_t = out([h_t; r_t])                                 (2)

numbers as in the paper. All heads address M_{t-1}; reads see what was just written. M_0 and w_0 are learned, h, c
and r are 0 before a document's first token. Norms are sqrt(|v|^2 + EPS), sharpening is a softmax of gamma log(w~ +
TINY): both are smooth, and neither divides by 0. Two implementations of the loop over tokens: ``naive``,
differentiated by autograd, and ``fused``, both passes written out (kernels.ntm).

Suffixes: B batch, T tokens, D model width, H inner width (controller), G = 4H gates, R read and V write heads, Q = R
+ V all heads (reads first), N slots, M slot width, S shifts, I what the heads are told.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.models.addressing import content, rotate, sharpen
from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.kernels import ntm as kernel
from stepladder.models.layers import linear, no_autocast
from stepladder.models.mixers.lstm import Scan, cell, gate_bias, zeros


@dataclass(frozen=True)
class Carried:
    """Controller, reads (B, R, M), memory and weights of all heads after the last token, float32 or wider."""

    h_BH: Tensor
    c_BH: Tensor
    r_BRM: Tensor
    memory_BNM: Tensor
    w_BQN: Tensor


@dataclass(frozen=True)
class Told:
    """What the heads are told at a token, ready for use."""

    gate_BQ: Tensor
    erase_BVM: Tensor
    add_BVM: Tensor
    strength_BQ: Tensor
    sharp_BQ: Tensor
    shift_BQS: Tensor
    key_BQM: Tensor


class NTM(Part):
    """out([h_t; r_t]) of the machine above. Source and differences: zoo.ntm. ``gain`` scales the initial output map."""

    def __init__(
        self,
        width: int,
        inner: int,
        *,
        slots: int,
        slot_width: int,
        reads: int,
        writes: int,
        shift: int,
        scan: Scan,
        chunk: int,
        gain: float,
    ) -> None:
        super().__init__()
        if 2 * shift + 1 > slots:
            raise UserError(f"shifts by up to {shift} slots either way need {2 * shift + 1} slots; there are {slots}")
        self.inner, self.reads, self.writes, self.shift = inner, reads, writes, shift
        self.scan, self.chunk = scan, chunk
        self.site = 0  # which of a model's parts this is; names what it notes
        heads, read = reads + writes, reads * slot_width
        self.sizes = told_sizes(reads, writes, shift, slot_width)
        self.project, self.recur = linear(width, 4 * inner), linear(inner + read, 4 * inner)
        self.bias = gate_bias(inner)
        self.tell, self.tell_bias = linear(inner, sum(self.sizes)), nn.Parameter(torch.zeros(sum(self.sizes)))
        self.memory_NM = nn.Parameter(0.1 * torch.randn(slots, slot_width))
        self.start_QN = nn.Parameter(torch.randn(heads, slots))
        self.out = linear(inner + read, width, gain)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        if state is None:
            state = self.init_state(len(x_BTD), 0, x_BTD.device, x_BTD.dtype, None)
        run = self._naive if self.scan == "naive" else self._fused
        y_TBF, w_TBQN, after = run(x_BTD, state, ctx)
        if ctx.sink.trace is not None:
            for name, w in zip(
                ("read", "write"), w_TBQN.transpose(0, 1).split((self.reads, self.writes), 2), strict=True
            ):
                ctx.note(f"ntm{self.site}.{name}", w)
        return self.out(y_TBF.to(self.out.weight.dtype)).transpose(0, 1), after

    def _naive(self, x_BTD: Tensor, state: Carried, ctx: Context) -> tuple[Tensor, Tensor, Carried]:
        """The equations as they are written, token by token."""
        found, weights, wide = [], [], state.c_BH.dtype
        for x_BD, position_B in zip(x_BTD.unbind(1), ctx.positions_BT.unbind(1), strict=True):
            heard_BG = F.linear(x_BD, self.project.weight, self.bias).to(wide)
            with no_autocast(x_BD.device):
                state = self._token(heard_BG, self._begun(state, position_B == 0))
            found.append(torch.cat((state.h_BH, state.r_BRM.flatten(1)), dim=-1))
            weights.append(state.w_BQN)
        return torch.stack(found), torch.stack(weights), state

    def _fused(self, x_BTD: Tensor, state: Carried, ctx: Context) -> tuple[Tensor, Tensor, Carried]:
        wide, inner = state.c_BH.dtype, self.inner
        x_TBG = F.linear(x_BTD.transpose(0, 1), self.project.weight, self.bias).to(wide)
        past_BF = torch.cat((state.h_BH, state.r_BRM.flatten(1)), dim=-1)
        maps = (each.to(wide) for each in (self.recur.weight, self.tell.weight, self.tell_bias))
        start = self.memory_NM.to(wide), self.start_QN.to(wide).softmax(-1)
        found = past_BF, state.c_BH, state.memory_BNM, state.w_BQN
        given = kernel.Given._make((x_TBG, *maps, *start, ctx.positions_BT.t() == 0, *found))
        with no_autocast(x_BTD.device):
            made = kernel.ntm(given, (self.reads, self.writes, self.shift), self.chunk)
        h_BH, r_BF = made.y_TBF[-1].split((inner, self.reads * self.memory_NM.shape[1]), dim=-1)
        after = Carried(h_BH, made.c_BH, r_BF.unflatten(-1, (self.reads, -1)), made.memory_BNM, made.w_BQN)
        return made.y_TBF, made.w_TBQN, after

    def _begun(self, state: Carried, new_B: Tensor) -> Carried:
        """The state as a token finds it: afresh where a document begins, whatever the last one left behind."""
        h_BH, c_BH = (each.masked_fill(new_B[:, None], 0.0) for each in (state.h_BH, state.c_BH))
        r_BRM = state.r_BRM.masked_fill(new_B[:, None, None], 0.0)
        memory_NM, w_QN = self.memory_NM.to(h_BH.dtype), self.start_QN.to(h_BH.dtype).softmax(-1)
        memory_BNM = torch.where(new_B[:, None, None], memory_NM, state.memory_BNM)
        return Carried(h_BH, c_BH, r_BRM, memory_BNM, torch.where(new_B[:, None, None], w_QN, state.w_BQN))

    def _token(self, heard_BG: Tensor, before: Carried) -> Carried:
        """One transition of the machine."""
        recur, tell, tell_bias = (
            each.to(heard_BG.dtype) for each in (self.recur.weight, self.tell.weight, self.tell_bias)
        )
        seen = torch.cat((before.h_BH, before.r_BRM.flatten(1)), dim=-1)
        h_BH, c_BH = cell(heard_BG + F.linear(seen, recur), before.c_BH)
        told = self._told(F.linear(h_BH, tell, tell_bias))
        w_BQN = address(told, before.memory_BNM, before.w_BQN)
        memory_BNM = before.memory_BNM
        w_BVN = w_BQN[:, self.reads :]
        for w_BN, e_BM in zip(w_BVN.unbind(1), told.erase_BVM.unbind(1), strict=True):
            memory_BNM = memory_BNM * (1 - w_BN[:, :, None] * e_BM[:, None])
        memory_BNM = memory_BNM + w_BVN.transpose(1, 2) @ told.add_BVM
        return Carried(h_BH, c_BH, w_BQN[:, : self.reads] @ memory_BNM, memory_BNM, w_BQN)

    def _told(self, raw_BI: Tensor) -> Told:
        """The interface: gates and erasures by sigmoid, what is added by tanh, strengths > 0, sharpness > 1."""
        gate, erase, add, strength, sharp, shift, key = raw_BI.split(self.sizes, dim=-1)
        heads = self.reads + self.writes
        return Told(
            gate.sigmoid(),
            erase.sigmoid().unflatten(-1, (self.writes, -1)),
            add.tanh().unflatten(-1, (self.writes, -1)),
            F.softplus(strength),
            1 + F.softplus(sharp),
            shift.unflatten(-1, (heads, -1)).softmax(-1),
            key.unflatten(-1, (heads, -1)),
        )

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        """The state does not grow, so ``capacity`` means nothing here. The first token puts the learned start in."""
        (slots, slot_width), heads = self.memory_NM.shape, self.reads + self.writes
        shapes = [(self.inner,), (self.inner,), (self.reads, slot_width), (slots, slot_width), (heads, slots)]
        return Carried(*zeros(batch, shapes, device, dtype))

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """The maps, and per token the products of heads with the memory: compare, write, read."""
        (slots, slot_width), heads = self.memory_NM.shape, self.reads + self.writes
        matrices = sum(each.weight.numel() for each in (self.project, self.recur, self.tell, self.out))
        memory = slots * slot_width * (heads + self.reads + self.writes)
        state = 2 * self.inner + self.reads * slot_width + slots * (slot_width + heads)
        return Cost(self.own_params(), 2 * (matrices + memory), state * max(4, self.itemsize()))


def told_sizes(reads: int, writes: int, shift: int, slot_width: int) -> list[int]:
    """How many numbers the heads are told: gates, erasures, what is added, strengths, sharpness, shifts, keys."""
    heads, written = reads + writes, writes * slot_width
    return [heads, written, written, heads, heads, heads * (2 * shift + 1), heads * slot_width]


def address(told: Told, memory_BNM: Tensor, before_BQN: Tensor) -> Tensor:
    """The weights of all heads: by content, by where they were, shifted, sharpened (section 3.3 of the paper)."""
    w_BQN = content(told.key_BQM, told.strength_BQ, memory_BNM)
    w_BQN = torch.lerp(before_BQN, w_BQN, told.gate_BQ[..., None])
    return sharpen(rotate(w_BQN, told.shift_BQS), told.sharp_BQ)
