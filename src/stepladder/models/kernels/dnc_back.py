"""The backward pass of kernels.dnc, chunk by chunk from the last: memories and links are written once more, what
needs no later token is computed for all tokens of the chunk at once, and the rest in a loop.

Suffixes as in kernels.dnc; X = 2 R.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stepladder.models.kernels.dnc_forms import Allot, Given, Made, Sizes
from stepladder.models.kernels.heads import Compare, softmax_slope
from stepladder.models.kernels.loop import before, some_rows
from stepladder.models.kernels.lstm import Cell


def backward(slopes: tuple[Tensor, ...], given: Given, made: Made, chunk: int) -> tuple[Tensor, ...]:
    """Gradients of all that was given but the resets."""
    size, inner = Sizes(given.read_BRN.shape[1], given.start_NM.shape[1]), given.c_BH.shape[1]
    (_, recur_GF, tell_SH, bias_S, start_NM, reset_TB, past_BF, c_BH), state = given[:8], given[9:]
    dy_TBF, dc_BH, *dstate = slopes
    machine, later_BF = Machine(size, [each.clone() for each in dstate]), torch.zeros_like(past_BF)
    dc_BH = dc_BH.clone()
    dx_TBG, resets = torch.empty_like(made.gates_TBG), list(some_rows(reset_TB))
    drecur_GF, dtell_SH, dbias_S, dstart_NM = (torch.zeros_like(each) for each in (recur_GF, tell_SH, bias_S, start_NM))
    seen_TBF, cells_TBH = before(past_BF, made.y_TBF, reset_TB), before(c_BH, made.c_TBH, reset_TB)
    usage_BN, write_BN, recent_BN, _, read_BRN = state
    after = made.usage_TBN, made.write_TBN, made.read_TBRN
    pairs = (usage_BN, made.usage_TBN), (write_BN, made.write_TBN), (recent_BN, made.recent_TBN), (read_BRN, after[2])
    found = [before(first, values, reset_TB) for first, values in pairs]
    controller, dpast_BF, dh_BH = Cell(recur_GF, c_BH), torch.empty_like(later_BF), torch.empty_like(dc_BH)
    dr_BRM, direct_BH, dc_B1H = dpast_BF[:, inner:].unflatten(1, (size.reads, -1)), dpast_BF[:, :inner], dc_BH[:, None]
    for number, kept in reversed(list(enumerate(zip(made.memory_KBNM, made.links_KBIN, strict=True)))):
        block = slice(number * chunk, (number + 1) * chunk)
        told_CBS, dx_CBG, dtold_CBS = made.told_TBS[block], dx_TBG[block], torch.empty_like(made.told_TBS[block])
        now, past = ([each[block] for each in ones] for ones in (after, found))
        new_CB = reset_TB[block] if any(each is not None for each in resets[block]) else None
        ready = machine.ready(told_CBS, kept, now, past, new_CB, start_NM)
        cells = controller.ready(made.gates_TBG[block], cells_TBH[block], made.c_TBH[block], dx_CBG)
        groups = [dy_TBF[block], dtold_CBS, size.slopes(told_CBS)], cells, *ready
        tokens = (zip(*(reversed(each.unbind(0)) for each in group), strict=True) for group in groups)
        for reset_B, (dy_BF, dtold_BS, factor_BS), cell, *at in zip(reversed(resets[block]), *tokens, strict=True):
            torch.add(dy_BF, later_BF, out=dpast_BF)
            machine.back(dr_BRM, *at)
            torch.cat(machine.told, dim=1, out=dtold_BS).mul_(factor_BS)
            torch.addmm(direct_BH, dtold_BS, tell_SH, out=dh_BH)
            controller.back(dh_BH, dc_BH, dc_B1H, cell, later_BF)
            if reset_B is not None:
                dstart_NM += machine.dmemory_BNM.where(reset_B[:, None, None], 0.0).sum(0)
                for each in (*machine.dstate, dc_BH, later_BF):
                    each.masked_fill_(reset_B.view(-1, *(1,) * (each.dim() - 1)), 0.0)
        drecur_GF.addmm_(dx_CBG.flatten(0, 1).t(), seen_TBF[block].flatten(0, 1))
        dtell_SH.addmm_(dtold_CBS.flatten(0, 1).t(), made.y_TBF[block, :, :inner].flatten(0, 1))
        dbias_S += dtold_CBS.sum((0, 1))
    return dx_TBG, drecur_GF, dtell_SH, dbias_S, dstart_NM, later_BF, dc_BH, *machine.dstate


class Machine:
    """The way back through memory, links, usage and all weights, for one token after another.

    ``dstate``: gradients of memory, usage, write weights, precedence, links and read weights after a token; ``back``
    turns them into those before it and fills ``told``. Products of batches go into contiguous arrays only: torch
    loops over the batch to write into others.
    """

    def __init__(self, size: Sizes, dstate: list[Tensor]) -> None:
        self.size, self.dstate = size, dstate
        self.dmemory_BNM, self.dusage_BN, self.dwrite_BN, self.drecent_BN, self.dlinks_BIN, self.dread_BRN = dstate
        (batch, slots, slot_width), reads, new = self.dmemory_BNM.shape, size.reads, self.dmemory_BNM.new_empty
        self.to_write, self.to_read, self.allot = Compare(dstate[0], 1), Compare(dstate[0], reads), Allot(dstate[1])
        self.scratch_BNM, self.scratch_BIN = new(batch, slots, slot_width), new(batch, slots, slots)
        self.dmemory_BMN, self.scratch_BMN, self.dlinks_BNI = (
            each.mT for each in (self.dmemory_BNM, self.scratch_BNM, self.dlinks_BIN)
        )
        self.diagonal_BN = self.dlinks_BIN.diagonal(dim1=1, dim2=2)
        self.u_BRN, self.z_BRN = new(batch, reads, slots), new(batch, reads, slots)
        self.ways_BR3N = new(batch, reads, 3, slots)
        # Links L hear of reading weights w twice, L w and L^T w: one product of (2R, N) and (2R, N).
        self.to_BXN, self.from_BXN = new(batch, 2 * reads, slots), new(batch, 2 * reads, slots)
        self.to_BNX = self.to_BXN.mT
        self.dahead_BRN, self.read_to_BRN = self.to_BXN.split(reads, dim=1)
        self.read_from_BRN, self.dbehind_BRN = self.from_BXN.split(reads, dim=1)
        self.u_B1N, self.z_B1N, self.dw_B1N, self.u_BN1 = (
            new(batch, 1, slots),
            new(batch, 1, slots),
            new(batch, 1, slots),
            new(batch, slots, 1),
        )
        self.u_BN, self.z_BN, self.dw_BN, self.t_BN = (
            self.u_B1N[:, 0],
            self.z_B1N[:, 0],
            self.dw_B1N[:, 0],
            self.u_BN1[..., 0],
        )
        self.ds_B1, self.drecent_B1N, self.dread_BR1N = (
            new(batch, 1),
            self.drecent_BN[:, None],
            self.dread_BRN[:, :, None],
        )
        self.dfree, self.dallocate, self.dgate = new(batch, reads), new(batch, 1), new(batch, 1)
        self.derase, self.dvector = new(batch, 1, slot_width), new(batch, 1, slot_width)
        self.dmodes, self.dstrength, self.dstrengths = new(batch, reads, 3), new(batch, 1), new(batch, reads)
        self.dkey, self.dkeys = new(batch, 1, slot_width), new(batch, reads, slot_width)
        self.dstrength_B11, self.dstrengths_BR1 = self.dstrength[..., None], self.dstrengths[..., None]
        pieces = self.dfree, self.dallocate, self.dgate, self.derase, self.dstrength, self.dstrengths, self.dmodes
        self.told = [each.flatten(1) for each in (*pieces, self.dkey, self.dkeys, self.dvector)]

    def ready(
        self,
        told_CBS: Tensor,
        kept: tuple[Tensor, Tensor],
        after: list[Tensor],
        found: list[Tensor],
        new_CB: Tensor | None,
        start_NM: Tensor,
    ) -> tuple[list[Tensor], ...]:
        """What ``back`` is given, for a chunk.

        after: usage, write, read. found: usage, write, recent, read, one token earlier. kept: memory and links as
        the first token found them. new_CB: where documents begin, None if nowhere.
        """
        free, allocate, gate, erase, strengths, modes, keys, vector = self.size.split(told_CBS)
        usage, write, read = after
        usage_found, write_found, recent, read_found = found
        memory, links = _again(kept, write, recent, erase, vector, new_CB, start_NM)
        memory_found, links_found = memory[:-1], links[:-1]
        if new_CB is not None:
            at = new_CB[..., None, None]
            memory_found, links_found = torch.where(at, start_NM, memory_found), links_found.masked_fill(at, 0.0)
        strengths = strengths + 1
        to_write = self.to_write.ready(memory_found, keys[:, :, :1], strengths[..., :1])
        to_read = self.to_read.ready(memory[1:], keys[:, :, 1:], strengths[..., 1:])
        allot = self.allot.ready(usage)
        similar = to_write[0][:, :, 0]
        moved, mixed = allot[0] - similar, torch.lerp(similar, allot[0], allocate)
        ways = torch.stack((read_found @ links[1:], to_read[0], read_found @ links[1:].mT), dim=3)
        free = free[..., None]
        factors = 1 - free * read_found
        ones, heads = torch.ones_like(factors[:, :, 0]), factors.unbind(2)
        others = [math.prod((*heads[:one], *heads[one + 1 :]), start=ones) for one in range(len(heads))]
        others_CBRN, kept_CBN = torch.stack(others, dim=2), factors.prod(2)
        unfreed = torch.addcmul(write_found, usage_found, 1 - write_found)
        spare_CB1 = 1 - write.sum(-1, keepdim=True)
        row, column, spare_CBN1 = write[:, :, None], write[..., None], (1 - write)[..., None]
        reading = [memory[1:].mT, read.mT, modes, *(each[..., None] for each in modes.unbind(-1)), ways, read_found]
        linking = [links[1:], links[1:].mT, links_found, row, spare_CBN1, recent[..., None], recent, spare_CB1]
        writing = [row, column, erase, vector, memory_found, mixed, moved, allocate, gate]
        using = [unfreed, kept_CBN, 1 - write_found, 1 - usage_found, others_CBRN, read_found, free]
        return reading, linking, writing, using, to_read, to_write, allot

    def back(
        self,
        dr_BRM: Tensor,
        reading: Sequence[Tensor],
        linking: Sequence[Tensor],
        writing: Sequence[Tensor],
        using: Sequence[Tensor],
        to_read: Sequence[Tensor],
        to_write: Sequence[Tensor],
        allot: Sequence[Tensor],
    ) -> None:
        """One token, in the reverse order of mixers.dnc."""
        self._reading(dr_BRM, reading, to_read)
        self._linking(linking)
        self._writing(writing, to_write)
        self.dusage_BN.add_(self.allot.back(self.u_BN, allot))
        self._using(using)

    def _reading(self, dr_BRM: Tensor, ready: Sequence[Tensor], compared: Sequence[Tensor]) -> None:
        memory_BMN, read_BNR, modes, behind, similar, ahead, ways_BR3N, found_BRN = ready
        self.dread_BRN.add_(torch.bmm(dr_BRM, memory_BMN, out=self.z_BRN))
        self.dmemory_BNM.baddbmm_(read_BNR, dr_BRM)
        torch.sum(torch.mul(ways_BR3N, self.dread_BR1N, out=self.ways_BR3N), -1, out=self.dmodes)
        softmax_slope(self.dmodes, modes, -1, modes.dtype, grad_input=self.dmodes)
        torch.mul(self.dread_BRN, ahead, out=self.dahead_BRN)
        torch.mul(self.dread_BRN, behind, out=self.dbehind_BRN)
        torch.mul(self.dread_BRN, similar, out=self.u_BRN)
        self.read_to_BRN.copy_(found_BRN)
        self.read_from_BRN.copy_(found_BRN)
        self.to_read.back(self.u_BRN, compared, self.dstrengths, self.dstrengths_BR1, self.dkeys, self.dmemory_BNM)

    def _linking(self, ready: Sequence[Tensor]) -> None:
        """From here on dw holds what the write weights of this token are to hear; dread: the read weights before it."""
        links_BIN, links_BNI, found_BIN, w_B1N, spare_BN1, recent_BN1, recent_BN, spare_B1 = ready
        torch.bmm(self.dahead_BRN, links_BIN, out=self.dread_BRN).baddbmm_(self.dbehind_BRN, links_BNI)
        self.dlinks_BIN.baddbmm_(self.to_BNX, self.from_BXN)
        self.diagonal_BN.zero_()
        # p = (1 - sum w) p + w, and links of w with the p before
        torch.add(self.dwrite_BN, self.drecent_BN, out=self.dw_BN)
        torch.sum(torch.mul(self.drecent_BN, recent_BN, out=self.u_BN), -1, keepdim=True, out=self.ds_B1)
        self.dw_BN.sub_(self.ds_B1)
        self.drecent_BN.mul_(spare_B1)
        self.drecent_BN.add_(torch.bmm(w_B1N, self.dlinks_BIN, out=self.u_B1N)[:, 0])
        torch.bmm(self.dlinks_BIN, recent_BN1, out=self.u_BN1)
        self.dw_BN.add_(self.t_BN)
        # L = (1 - w_i - w_j) L
        torch.mul(self.dlinks_BIN, found_BIN, out=self.scratch_BIN)
        self.dw_BN.sub_(torch.sum(self.scratch_BIN, 1, out=self.u_BN))
        self.dw_BN.sub_(torch.sum(self.scratch_BIN, 2, out=self.u_BN))
        self.dlinks_BIN.mul_(torch.sub(spare_BN1, w_B1N, out=self.scratch_BIN))

    def _writing(self, ready: Sequence[Tensor], compared: Sequence[Tensor]) -> None:
        """Leaves the gradient of the allocation in u."""
        w_B1N, w_BN1, erase, vector, found_BNM, mixed_BN, moved_BN, allocate, gate = ready
        torch.bmm(w_B1N, self.dmemory_BNM, out=self.dvector)
        self.dw_B1N.baddbmm_(vector, self.dmemory_BMN)
        torch.mul(self.dmemory_BNM, found_BNM, out=self.scratch_BNM)
        torch.bmm(w_B1N, self.scratch_BNM, out=self.derase)
        self.dw_B1N.baddbmm_(erase, self.scratch_BMN, alpha=-1)
        self.dmemory_BNM.addcmul_(w_BN1, torch.mul(self.dmemory_BNM, erase, out=self.scratch_BNM), value=-1)
        torch.sum(torch.mul(self.dw_BN, mixed_BN, out=self.u_BN), -1, keepdim=True, out=self.dgate)
        self.dw_BN.mul_(gate)
        torch.sum(torch.mul(self.dw_BN, moved_BN, out=self.u_BN), -1, keepdim=True, out=self.dallocate)
        torch.mul(self.dw_BN, allocate, out=self.u_BN)
        torch.sub(self.dw_BN, self.u_BN, out=self.z_BN)
        self.to_write.back(self.z_B1N, compared, self.dstrength, self.dstrength_B11, self.dkey, self.dmemory_BNM)

    def _using(self, ready: Sequence[Tensor]) -> None:
        """usage = (u + w - u w) prod (1 - f w^r)."""
        unfreed_BN, kept_BN, unwritten_BN, unused_BN, others_BRN, found_BRN, free_BR1 = ready
        torch.mul(self.dusage_BN, unfreed_BN, out=self.u_BN)
        self.dusage_BN.mul_(kept_BN)
        torch.mul(self.dusage_BN, unused_BN, out=self.dwrite_BN)
        self.dusage_BN.mul_(unwritten_BN)
        torch.mul(others_BRN, self.u_B1N, out=self.u_BRN)
        torch.sum(torch.mul(self.u_BRN, found_BRN, out=self.z_BRN), -1, out=self.dfree)
        self.dread_BRN.addcmul_(self.u_BRN, free_BR1, value=-1)


def _again(
    kept: tuple[Tensor, Tensor],
    write_CBN: Tensor,
    recent_CBN: Tensor,
    erase: Tensor,
    vector: Tensor,
    new_CB: Tensor | None,
    start_NM: Tensor,
) -> tuple[Tensor, Tensor]:
    """Memories (1 + C, B, N, M) and links (1 + C, B, I, N) of a chunk once more: as found, then token by token."""
    memory, links = (each.new_empty(1 + len(write_CBN), *each.shape) for each in kept)
    for into, first in zip((memory, links), kept, strict=True):
        into[0].copy_(first)
    scratch_BNM, scratch_BIN = torch.empty_like(memory[0]), torch.empty_like(links[0])
    diagonals = links.diagonal(dim1=2, dim2=3)[1:].unbind(0)
    steps = (
        write_CBN[..., None],
        write_CBN[:, :, None],
        (1 - write_CBN)[..., None],
        recent_CBN[:, :, None],
        erase,
        vector,
    )
    tokens = zip(
        *(each.unbind(0) for each in (*steps, memory[:-1], memory[1:], links[:-1], links[1:])), diagonals, strict=True
    )
    for t, (
        w_BN1,
        w_B1N,
        spare_BN1,
        p_B1N,
        erase_B1M,
        vector_B1M,
        memory_BNM,
        left_BNM,
        links_BIN,
        made_BIN,
        zero,
    ) in enumerate(tokens):
        if new_CB is not None:
            at = new_CB[t, :, None, None]
            memory_BNM, links_BIN = torch.where(at, start_NM, memory_BNM), links_BIN.masked_fill(at, 0.0)
        torch.mul(memory_BNM, erase_B1M, out=scratch_BNM)
        torch.addcmul(memory_BNM, w_BN1, scratch_BNM, value=-1, out=left_BNM).baddbmm_(w_BN1, vector_B1M)
        torch.mul(links_BIN, torch.sub(spare_BN1, w_B1N, out=scratch_BIN), out=made_BIN).addcmul_(w_BN1, p_B1N)
        zero.zero_()
    return memory, links
