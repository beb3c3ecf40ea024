"""The recurrence of ``mixers.ntm`` with forward and backward written out.

The forward loop keeps, token by token, what is small: gates, cells, what the heads are told, their weights; of the
memory a copy every ``chunk`` tokens. The backward pass goes chunk by chunk from the last: it writes the chunk's
memories again, computes for all its tokens at once whatever needs no later token, and loops over the rest. Gradients
of the weights are products over a chunk. To autograd and torch.compile the whole loop is one operator.

Suffixes as in mixers.ntm; time comes first here, F = H + R M is [h; r], C the tokens of a chunk, K the chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.models.addressing import TINY
from stepladder.models.kernels.heads import Compare, softmax_slope, softplus_, softplus_slope
from stepladder.models.kernels.loop import Loop, before, some_rows, stepwise
from stepladder.models.kernels.lstm import Cell


@dataclass(frozen=True)
class Sizes:
    """How many heads read and write, and how far they shift; and where things stand in what the heads are told."""

    reads: int
    writes: int
    shift: int
    slot_width: int

    @property
    def heads(self) -> int:
        return self.reads + self.writes

    def split(self, told: Tensor) -> tuple[Tensor, ...]:
        """gate (Q), erase, add (V, M), strength, sharp (Q), shift (Q, S), key (Q, M): views of (..., I)."""
        q, v, m = self.heads, self.writes, self.slot_width
        sizes = (q, v * m, v * m, q, q, q * (2 * self.shift + 1), q * m)
        gate, erase, add, strength, sharp, shift, key = told.split(sizes, dim=-1)
        erase, add = (each.unflatten(-1, (v, m)) for each in (erase, add))
        return gate, erase, add, strength, sharp, *(each.unflatten(-1, (q, -1)) for each in (shift, key))

    def kinds(self, told: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What goes through a sigmoid, through tanh, through softplus: views of (..., I)."""
        sigmoids, tanhs = self.heads + self.writes * self.slot_width, self.writes * self.slot_width
        sizes = sigmoids, tanhs, 2 * self.heads, told.shape[-1] - sigmoids - tanhs - 2 * self.heads
        sigmoids, tanhs, positive, _ = told.split(sizes, dim=-1)
        return sigmoids, tanhs, positive

    def slopes(self, told: Tensor) -> Tensor:
        """By what gradients go back through those maps; erasures take away; shifts (a softmax) and keys: 1."""
        found = torch.ones_like(told)
        (sigmoids, tanhs, positive), (to_sigmoids, to_tanhs, to_positive) = self.kinds(told), self.kinds(found)
        torch.mul(sigmoids, 1 - sigmoids, out=to_sigmoids)
        to_sigmoids[..., self.heads :].neg_()
        torch.addcmul(to_tanhs, tanhs, tanhs, value=-1, out=to_tanhs)
        to_positive.copy_(softplus_slope(positive))
        return found


class Given(NamedTuple):
    """What the loop is given.

    x_TBG: W x + b. recur, tell, bias: the maps of [h; r] to the gates and of h to the heads. start: memory and
    weights where ``reset_TB``. past_BF = [h; r], c, memory, w: before the first token. All of one type, float32 or
    wider.
    """

    x_TBG: Tensor
    recur_GF: Tensor
    tell_IH: Tensor
    bias_I: Tensor
    start_NM: Tensor
    start_QN: Tensor
    reset_TB: Tensor
    past_BF: Tensor
    c_BH: Tensor
    memory_BNM: Tensor
    w_BQN: Tensor


class Made(NamedTuple):
    """[h; r] of all tokens; c, memory and weights after the last. Kept: weights, gates, cells, told; memories."""

    y_TBF: Tensor
    c_BH: Tensor
    memory_BNM: Tensor
    w_BQN: Tensor
    w_TBQN: Tensor
    gates_TBG: Tensor
    c_TBH: Tensor
    told_TBI: Tensor
    memory_KBNM: Tensor


def ntm(given: Given, heads: tuple[int, int, int], chunk: int) -> Made:
    """The loop. heads: how many read and write, how far they shift. Only the first four results have gradients."""
    return Made(*_LOOP(given, *heads, chunk))


def _shapes(given: Given, reads: int, writes: int, shift: int, chunk: int, keep: bool) -> Made:
    """The arrays to fill; what is only for a backward pass has room for one token without ``keep``."""
    tokens, batch, gates = given.x_TBG.shape
    places, new = tokens if keep else 1, given.x_TBG.new_empty
    lasts = (new(each.shape) for each in (given.c_BH, given.memory_BNM, given.w_BQN))
    shapes = (batch, gates), given.c_BH.shape, (batch, len(given.bias_I))
    kept = (new(places, *shape) for shape in shapes)
    found = new(tokens, *given.past_BF.shape), *lasts, new(tokens, *given.w_BQN.shape), *kept
    return Made._make((*found, new(-(-places // chunk), *given.memory_BNM.shape)))


def _forward(given: Given, reads: int, writes: int, shift: int, chunk: int, keep: bool) -> Made:
    made, size = _shapes(given, reads, writes, shift, chunk, keep), Sizes(reads, writes, shift, given.start_NM.shape[1])
    x_TBG, recur_GF, tell_IH, bias_I, start_NM, start_QN, reset_TB, past_BF, c_BH, memory_BNM, w_BQN = given
    tokens, tell_HI = len(x_TBG), tell_IH.t().contiguous()
    memory_BNM = made.memory_BNM.copy_(memory_BNM)
    memory_BMN, scratch_BNM = memory_BNM.transpose(1, 2), torch.empty_like(memory_BNM)
    controller, compare, ring = Cell(recur_GF, c_BH), Compare(memory_BNM, size.heads), Ring(w_BQN, shift)
    h_BH, told_BI = torch.empty_like(c_BH), torch.empty_like(made.told_TBI[0])
    gate, erase, add, strength, sharp, turn, key = size.split(told_BI)
    gate_BQ1, sharp_BQ1, turns_BQ1 = gate[..., None], sharp[..., None], [by[..., None] for by in turn.unbind(-1)]
    sigmoids, tanhs, positive = size.kinds(told_BI)
    erases = erase.split(1, dim=1)
    shifted_BQN, power_BQN = torch.empty_like(w_BQN), torch.empty_like(w_BQN)
    tiny, r_BRM = torch.full_like(w_BQN[:1, :1, :1], TINY), memory_BNM.new_empty(len(c_BH), reads, size.slot_width)
    r_BF = r_BRM.flatten(1)
    read_TBRN, write_TBVN = made.w_TBQN.split((reads, writes), dim=2)
    views = made.y_TBF, made.gates_TBG, made.c_TBH, made.told_TBI, made.w_TBQN, read_TBRN
    views = *views, write_TBVN.mT, *write_TBVN[..., None].unbind(2)
    for t, (x_BG, reset_B, y_BF, gates_BG, new_BH, kept_BI, new_BQN, read_BRN, write_BNV, *columns) in enumerate(
        zip(x_TBG.unbind(0), some_rows(reset_TB), *(stepwise(view, tokens) for view in views), strict=False)
    ):
        if reset_B is not None:
            at_B1, at_B11 = reset_B[:, None], reset_B[:, None, None]
            past_BF, c_BH = past_BF.masked_fill(at_B1, 0.0), c_BH.masked_fill(at_B1, 0.0)
            memory_BNM.copy_(torch.where(at_B11, start_NM, memory_BNM))
            w_BQN = torch.where(at_B11, start_QN, w_BQN)
        if keep and t % chunk == 0:
            made.memory_KBNM[t // chunk].copy_(memory_BNM)
        controller.forward(x_BG, past_BF, c_BH, new_BH, h_BH)
        torch.addmm(bias_I, h_BH, tell_HI, out=told_BI)
        sigmoids.sigmoid_()
        tanhs.tanh_()
        softplus_(positive)
        turn.copy_(turn.softmax(-1))  # torch 2.13 writes a softmax into strided arrays as if they were contiguous
        content_BQN = compare.forward(memory_BNM, memory_BMN, key, strength)
        torch.lerp(w_BQN, content_BQN, gate_BQ1, out=ring.flat_BQN)
        ring.close()
        torch.addcmul(tiny, ring.up[0], turns_BQ1[0], out=shifted_BQN)
        for moved_BQN, turn_BQ1 in zip(ring.up[1:], turns_BQ1[1:], strict=True):
            shifted_BQN.addcmul_(moved_BQN, turn_BQ1)
        shifted_BQN.log_()
        torch.softmax(torch.addcmul(shifted_BQN, shifted_BQN, sharp_BQ1, out=power_BQN), -1, out=new_BQN)
        _write(memory_BNM, write_BNV, columns, erases, add, scratch_BNM, memory_BNM)
        torch.bmm(read_BRN, memory_BNM, out=r_BRM)
        torch.cat((h_BH, r_BF), dim=1, out=y_BF)
        if keep:
            gates_BG.copy_(controller.gates_BG)
            kept_BI.copy_(told_BI)
        past_BF, c_BH, w_BQN = y_BF, new_BH, new_BQN
    made.c_BH.copy_(c_BH)
    made.w_BQN.copy_(w_BQN)
    return made


class Ring:
    """Weights (B, Q, N) with their ends repeated on the other side, so that every circular shift is a view.

    ``flat`` is to be filled, then ``close`` called. up: w_{i + s - r} for s = 0 .. 2r; down: w_{i + r - s}.
    """

    def __init__(self, like_BQN: Tensor, shift: int) -> None:
        slots = like_BQN.shape[-1]
        self.flat_BQN = torch.empty_like(like_BQN)
        self.whole = like_BQN.new_empty(*like_BQN.shape[:-1], slots + 2 * shift)
        self.parts = self.flat_BQN[..., slots - shift :], self.flat_BQN, self.flat_BQN[..., :shift]
        self.up = [self.whole[..., by : by + slots] for by in range(2 * shift + 1)]
        self.down = self.up[::-1]

    def close(self) -> None:
        torch.cat(self.parts, dim=-1, out=self.whole)


def _write(
    memory_BNM: Tensor,
    w_BNV: Tensor,
    columns: Iterable[Tensor],
    erases: Iterable[Tensor],
    add_BVM: Tensor,
    scratch_BNM: Tensor,
    into_BNM: Tensor,
) -> None:
    """M prod_v (1 - w_v e_v) + sum_v w_v a_v, into ``into``, which may be the memory itself.

    For every head the weights as a column (B, N, 1) of ``w``, and erasures (B, 1, M).
    """
    for w_BN1, erase_B1M in zip(columns, erases, strict=True):
        torch.mul(memory_BNM, erase_B1M, out=scratch_BNM)
        memory_BNM = torch.addcmul(memory_BNM, w_BN1, scratch_BNM, value=-1, out=into_BNM)
    torch.baddbmm(into_BNM, w_BNV, add_BVM, out=into_BNM)  # not baddbmm_, which torch's FLOP counter does not know


def _backward(
    slopes: tuple[Tensor, ...], given: Given, made: Made, reads: int, writes: int, shift: int, chunk: int
) -> tuple[Tensor, ...]:
    size, inner = Sizes(reads, writes, shift, given.start_NM.shape[1]), given.c_BH.shape[1]
    _, recur_GF, tell_IH, bias_I, start_NM, start_QN, reset_TB, past_BF, c_BH, memory_BNM, w_BQN = given
    y_TBF, _, _, _, w_TBQN, gates_TBG, c_TBH, told_TBI, memory_KBNM = made
    dy_TBF, (dc_BH, dmemory_BNM, dw_BQN), later_BF = (
        slopes[0],
        (s.clone() for s in slopes[1:]),
        torch.zeros_like(past_BF),
    )
    dx_TBG, resets = torch.empty_like(gates_TBG), list(some_rows(reset_TB))
    drecur_GF, dtell_IH, dbias_I, dstart_NM, dstart_QN = (
        torch.zeros_like(each) for each in (recur_GF, tell_IH, bias_I, start_NM, start_QN)
    )
    seen_TBF, cells_TBH = before(past_BF, y_TBF, reset_TB), before(c_BH, c_TBH, reset_TB)
    found_TBQN = before(w_BQN, w_TBQN, reset_TB, start_QN)
    controller, compare, heads = Cell(recur_GF, c_BH), Compare(memory_BNM, size.heads), Heads(size, dmemory_BNM)
    dpast_BF, dh_BH = torch.empty_like(later_BF), torch.empty_like(dc_BH)
    dr_BRM, direct_BH, dc_B1H = dpast_BF[:, inner:].unflatten(1, (reads, -1)), dpast_BF[:, :inner], dc_BH[:, None]
    for number, memory_BNM in reversed(list(enumerate(memory_KBNM))):
        block = slice(number * chunk, (number + 1) * chunk)
        told_CBI, w_CBQN, dx_CBG, dtold_CBI = (
            told_TBI[block],
            w_TBQN[block],
            dx_TBG[block],
            torch.empty_like(told_TBI[block]),
        )
        new_CB = reset_TB[block] if any(each is not None for each in resets[block]) else None
        memories = _again(size, memory_BNM, w_CBQN, told_CBI, new_CB, start_NM)
        memory_CBNM, left_CBMN = memories[:-1], memories[1:].mT
        if new_CB is not None:
            memory_CBNM = torch.where(new_CB[..., None, None], start_NM, memory_CBNM)
        *_, strength, _, _, key = size.split(told_CBI)
        compared = compare.ready(memory_CBNM, key, strength)
        placed = heads.ready(w_CBQN, found_TBQN[block], compared[0], told_CBI, memory_CBNM)
        cells = controller.ready(gates_TBG[block], cells_TBH[block], c_TBH[block], dx_CBG)
        groups = [dy_TBF[block], left_CBMN, dtold_CBI, size.slopes(told_CBI)], placed, compared, cells
        tokens = (zip(*(reversed(each.unbind(0)) for each in group), strict=True) for group in groups)
        for reset_B, (dy_BF, left_BMN, dtold_BI, factor_BI), at, by, cell in zip(
            reversed(resets[block]), *tokens, strict=True
        ):
            torch.add(dy_BF, later_BF, out=dpast_BF)
            dcontent_BQN = heads.back(dr_BRM, left_BMN, at, dw_BQN, dmemory_BNM)
            compare.back(dcontent_BQN, by, heads.dstrength, heads.dstrength_BQ1, heads.dkey, dmemory_BNM)
            torch.cat(heads.told, dim=1, out=dtold_BI).mul_(factor_BI)
            torch.addmm(direct_BH, dtold_BI, tell_IH, out=dh_BH)
            controller.back(dh_BH, dc_BH, dc_B1H, cell, later_BF)
            if reset_B is not None:
                at_B1, at_B11 = reset_B[:, None], reset_B[:, None, None]
                dstart_NM += dmemory_BNM.where(at_B11, 0.0).sum(0)
                dstart_QN += dw_BQN.where(at_B11, 0.0).sum(0)
                for each, new in ((dmemory_BNM, at_B11), (dw_BQN, at_B11), (dc_BH, at_B1), (later_BF, at_B1)):
                    each.masked_fill_(new, 0.0)
        drecur_GF.addmm_(dx_CBG.flatten(0, 1).t(), seen_TBF[block].flatten(0, 1))
        dtell_IH.addmm_(dtold_CBI.flatten(0, 1).t(), y_TBF[block, :, :inner].flatten(0, 1))
        dbias_I += dtold_CBI.sum((0, 1))
    return dx_TBG, drecur_GF, dtell_IH, dbias_I, dstart_NM, dstart_QN, later_BF, dc_BH, dmemory_BNM, dw_BQN


class Heads:
    """The way back through reading, writing, sharpening, shifting and mixing, for one token after another.

    Products of batches go into contiguous arrays only: torch loops over the batch to write into others.
    """

    def __init__(self, size: Sizes, memory_BNM: Tensor) -> None:
        (batch, slots, slot_width), heads, turns = memory_BNM.shape, size.heads, 2 * size.shift + 1
        new = memory_BNM.new_empty
        self.size, self.scratch_BNM, self.ring = (
            size,
            torch.empty_like(memory_BNM),
            Ring(new(batch, heads, slots), size.shift),
        )
        self.scratch_BMN, self.ring_BQ1N = self.scratch_BNM.transpose(1, 2), self.ring.flat_BQN[:, :, None]
        self.u_BQN, self.z_BQN, self.turned_BQSN = (
            new(batch, heads, slots),
            new(batch, heads, slots),
            new(batch, heads, turns, slots),
        )
        self.dread_BRN, self.dwrite_BVN = new(batch, size.reads, slots), new(batch, size.writes, slots)
        self.dgate, self.dstrength, self.dsharp = (new(batch, heads) for _ in range(3))
        self.derase, self.dadd = (new(batch, size.writes, slot_width) for _ in range(2))
        self.dturn, self.dkey = new(batch, heads, turns), new(batch, heads, slot_width)
        self.dstrength_BQ1 = self.dstrength[..., None]
        pieces = self.dgate, self.derase, self.dadd, self.dstrength, self.dsharp, self.dturn, self.dkey
        self.told = [each.flatten(1) for each in pieces]
        self.each = list(zip(self.derase.split(1, dim=1), self.dwrite_BVN.split(1, dim=1), strict=True))

    def ready(
        self, w_CBQN: Tensor, before_CBQN: Tensor, content_CBQN: Tensor, told_CBI: Tensor, memory_CBNM: Tensor
    ) -> list[Tensor]:
        """What ``back`` is given, for a chunk."""
        gate, erase, add, _, sharp, turn, _ = self.size.split(told_CBI)
        moved, gate = content_CBQN - before_CBQN, gate[..., None]
        mixed, reach = torch.lerp(before_CBQN, content_CBQN, gate), self.size.shift
        slots, turns = mixed.shape[-1], [each[..., None] for each in turn.unbind(-1)]
        whole = torch.cat((mixed[..., slots - reach :], mixed, mixed[..., :reach]), dim=-1)
        shifted = sum(
            (whole[..., by : by + slots] * turn_1 for by, turn_1 in enumerate(turns)), torch.full_like(mixed, TINY)
        )
        steep, lw = (1 + sharp)[..., None] / shifted, shifted.log()
        reads = self.size.reads
        write_CBVN = w_CBQN[:, :, reads:]
        found = [w_CBQN, w_CBQN[:, :, :reads].transpose(2, 3), write_CBVN, add, gate, moved]
        found += [whole.unfold(-1, slots, 1), lw, steep, turn, *turns]
        partial = memory_CBNM
        for head in range(self.size.writes):
            w_CBN1, erase_CB1M = write_CBVN[:, :, head, :, None], erase[:, :, head : head + 1]
            found += [write_CBVN[:, :, head : head + 1], w_CBN1, erase_CB1M, partial]
            if head + 1 < self.size.writes:
                partial = partial - w_CBN1 * (partial * erase_CB1M)
        return found

    def back(
        self, dr_BRM: Tensor, left_BMN: Tensor, ready: Sequence[Tensor], dw_BQN: Tensor, dmemory_BNM: Tensor
    ) -> Tensor:
        """The gradient of the weights by content. Fills the rest of ``told``; dw and dmemory become those before."""
        w, read_BNR, write_BVN, add, gate, moved, windows, lw, steep, turn, *rest = ready
        turns, rest = rest[: turn.shape[-1]], rest[turn.shape[-1] :]
        u, z, scratch, dmemory_BMN = self.u_BQN, self.z_BQN, self.scratch_BNM, dmemory_BNM.transpose(1, 2)
        # r = w M
        torch.bmm(dr_BRM, left_BMN, out=self.dread_BRN)
        dmemory_BNM.baddbmm_(read_BNR, dr_BRM)
        # M = found prod (1 - w e) + sum w a, the last erasure first
        torch.bmm(write_BVN, dmemory_BNM, out=self.dadd)
        torch.bmm(add, dmemory_BMN, out=self.dwrite_BVN)
        for head in reversed(range(self.size.writes)):
            (derase_B1M, dwrite_B1N), (w_B1N, w_BN1, erase_B1M, partial) = (
                self.each[head],
                rest[4 * head : 4 * head + 4],
            )
            torch.mul(dmemory_BNM, partial, out=scratch)
            torch.bmm(w_B1N, scratch, out=derase_B1M)
            dwrite_B1N.baddbmm_(erase_B1M, self.scratch_BMN, alpha=-1)
            torch.mul(dmemory_BNM, erase_B1M, out=scratch)
            dmemory_BNM.addcmul_(w_BN1, scratch, value=-1)
        # w = softmax((1 + sharp) lw), lw = log of what was shifted
        dw_BQN.add_(torch.cat((self.dread_BRN, self.dwrite_BVN), dim=1, out=z))
        softmax_slope(dw_BQN, w, -1, w.dtype, grad_input=u)
        torch.sum(torch.mul(u, lw, out=z), -1, out=self.dsharp)
        torch.mul(u, steep, out=self.ring.flat_BQN)
        self.ring.close()
        torch.sum(torch.mul(windows, self.ring_BQ1N, out=self.turned_BQSN), -1, out=self.dturn)
        softmax_slope(self.dturn, turn, -1, turn.dtype, grad_input=self.dturn)
        torch.mul(self.ring.down[0], turns[0], out=u)
        for view, turn_BQ1 in zip(self.ring.down[1:], turns[1:], strict=True):
            u.addcmul_(view, turn_BQ1)
        # between the weights by content and those of the token before
        torch.sum(torch.mul(u, moved, out=z), -1, out=self.dgate)
        torch.mul(u, gate, out=z)
        torch.sub(u, z, out=dw_BQN)
        return z


def _a_head(x_CBV: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For every token, one view a head."""
    return zip(*(head.unbind(0) for head in x_CBV.unbind(2)), strict=True)


def _again(
    size: Sizes, kept_BNM: Tensor, w_CBQN: Tensor, told_CBI: Tensor, new_CB: Tensor | None, start_NM: Tensor
) -> Tensor:
    """The memories of a chunk once more: as its first token found it, then after every token, (1 + C, B, N, M).

    new_CB: where documents begin, or None if nowhere. What a token finds there is the start, whatever was left.
    """
    memory, scratch_BNM = kept_BNM.new_empty(1 + len(w_CBQN), *kept_BNM.shape), torch.empty_like(kept_BNM)
    memory[0].copy_(kept_BNM)
    _, erase, add, *_ = size.split(told_CBI)
    write_CBVN = w_CBQN[:, :, size.reads :]
    steps = (each.unbind(0) for each in (write_CBVN.mT, add, memory[:-1], memory[1:]))
    columns, erases = _a_head(write_CBVN[..., None]), _a_head(erase[:, :, :, None])
    for t, (w_BNV, add_BVM, memory_BNM, left_BNM, w_BN1s, erase_B1Ms) in enumerate(
        zip(*steps, columns, erases, strict=True)
    ):
        if new_CB is not None:
            memory_BNM = torch.where(new_CB[t, :, None, None], start_NM, memory_BNM)
        _write(memory_BNM, w_BNV, w_BN1s, erase_B1Ms, add_BVM, scratch_BNM, left_BNM)
    return memory


_LOOP = Loop("ntm", Given, Made, _forward, _backward, _shapes, outputs=4, numbers=4)
