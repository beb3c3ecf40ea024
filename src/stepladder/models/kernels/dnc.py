"""The recurrence of ``mixers.dnc`` with forward and backward written out; the scheme is that of kernels.ntm.

Kept are, token by token, gates, cells, what the heads are told, usage, precedence and all weights; memory and links
only every ``chunk`` tokens.

Suffixes as in mixers.dnc; time comes first here, F = H + R M is [h; r], C the tokens of a chunk, K the chunks.
"""

from __future__ import annotations

import torch

from stepladder.models.kernels.dnc_back import backward
from stepladder.models.kernels.dnc_forms import Allot, Given, Made, Sizes
from stepladder.models.kernels.heads import Compare, softplus_
from stepladder.models.kernels.loop import Loop, some_rows, stepwise
from stepladder.models.kernels.lstm import Cell


def dnc(given: Given, chunk: int) -> Made:
    """The loop. Only the first eight results have gradients."""
    return Made(*_LOOP(given, chunk))


def _shapes(given: Given, chunk: int, keep: bool) -> Made:
    """The arrays to fill; what is only for a backward pass has room for one token without ``keep``."""
    tokens, batch, gates = given.x_TBG.shape
    places, new = tokens if keep else 1, given.x_TBG.new_empty
    traced = (new(tokens, *each.shape) for each in (given.read_BRN, given.write_BN, given.usage_BN))
    shapes = given.recent_BN.shape, (batch, gates), given.c_BH.shape, (batch, len(given.bias_S))
    kept = (new(places, *shape) for shape in shapes)
    copies = (new(-(-places // chunk), *each.shape) for each in (given.memory_BNM, given.links_BIN))
    found = new(tokens, *given.past_BF.shape), *(new(each.shape) for each in given[7:]), *traced, *kept, *copies
    return Made._make(found)


def _forward(given: Given, chunk: int, keep: bool) -> Made:
    made, reads = _shapes(given, chunk, keep), given.read_BRN.shape[1]
    x_TBG, recur_GF, tell_SH, bias_S, start_NM, reset_TB, past_BF, c_BH, memory_BNM, *machine = given
    usage_BN, write_BN, recent_BN, links_BIN, read_BRN = machine
    size = Sizes(reads, start_NM.shape[1])
    tokens, tell_HS = len(x_TBG), tell_SH.t().contiguous()
    memory_BNM, links_BIN = made.memory_BNM.copy_(memory_BNM), made.links_BIN.copy_(links_BIN)
    memory_BMN, links_BNI, diagonal_BN = memory_BNM.mT, links_BIN.mT, links_BIN.diagonal(dim1=1, dim2=2)
    controller, h_BH = Cell(recur_GF, c_BH), torch.empty_like(c_BH)
    to_write, to_read = Compare(memory_BNM, 1), Compare(memory_BNM, reads)
    told_BS = torch.empty_like(made.told_TBS[0])
    free, allocate, gate, erase, positive, modes, keys, vector = size.split(told_BS)
    free_BR1, ways, sigmoids = free[..., None], [each[..., None] for each in modes.unbind(-1)], size.kinds(told_BS)[0]
    strengths, (write_key, read_keys) = torch.empty_like(positive.contiguous()), keys.split((1, reads), dim=1)
    write_strength, read_strengths = strengths.split((1, reads), dim=1)
    scratch_BNM, scratch_BIN, allot = torch.empty_like(memory_BNM), torch.empty_like(links_BIN), Allot(usage_BN)
    one, kept_BRN, kept_BN, mixed_BN = (
        torch.ones_like(usage_BN[:1, :1]),
        torch.empty_like(read_BRN),
        torch.empty_like(usage_BN),
        torch.empty_like(usage_BN),
    )
    spare_BN, spare_B1 = 1 - write_BN, torch.empty_like(usage_BN[:, :1])
    spare_BI1, ahead_BRN, behind_BRN = spare_BN[..., None], torch.empty_like(read_BRN), torch.empty_like(read_BRN)
    r_BRM = memory_BNM.new_empty(len(c_BH), reads, size.slot_width)
    r_BF = r_BRM.flatten(1)
    weights = made.read_TBRN, made.write_TBN, made.usage_TBN, made.recent_TBN
    rows = made.write_TBN[..., None], made.write_TBN[:, :, None], made.recent_TBN[:, :, None]
    views = made.y_TBF, made.gates_TBG, made.c_TBH, made.told_TBS, *weights, *rows
    recent_B1N = recent_BN[:, None]
    for t, (x_BG, reset_B, y_BF, gates_BG, new_BH, kept_BS, *new, new_BI1, new_B1N, newest_B1N) in enumerate(
        zip(x_TBG.unbind(0), some_rows(reset_TB), *(stepwise(view, tokens) for view in views), strict=False)
    ):
        if reset_B is not None:
            at_B1, at_B11 = reset_B[:, None], reset_B[:, None, None]
            past_BF, c_BH, usage_BN, write_BN, recent_BN = (
                each.masked_fill(at_B1, 0.0) for each in (past_BF, c_BH, usage_BN, write_BN, recent_BN)
            )
            read_BRN, recent_B1N = read_BRN.masked_fill(at_B11, 0.0), recent_BN[:, None]
            memory_BNM.copy_(torch.where(at_B11, start_NM, memory_BNM))
            links_BIN.masked_fill_(at_B11, 0.0)
            spare_BN.masked_fill_(at_B1, 1.0)
        if keep and t % chunk == 0:
            made.memory_KBNM[t // chunk].copy_(memory_BNM)
            made.links_KBIN[t // chunk].copy_(links_BIN)
        new_BRN, new_BN, used_BN, newest_BN = new
        controller.forward(x_BG, past_BF, c_BH, new_BH, h_BH)
        torch.addmm(bias_S, h_BH, tell_HS, out=told_BS)
        sigmoids.sigmoid_()
        softplus_(positive)
        modes.copy_(modes.softmax(-1))  # torch 2.13 writes a softmax into strided arrays as if they were contiguous
        torch.add(positive, 1, out=strengths)
        # where to write: usage, allocation, content
        torch.prod(torch.addcmul(one, free_BR1, read_BRN, value=-1, out=kept_BRN), 1, out=kept_BN)
        torch.mul(torch.addcmul(write_BN, usage_BN, spare_BN, out=used_BN), kept_BN, out=used_BN)
        similar_BN = to_write.forward(memory_BNM, memory_BMN, write_key, write_strength)[:, 0]
        torch.lerp(similar_BN, allot.forward(used_BN), allocate, out=mixed_BN)
        torch.mul(mixed_BN, gate, out=new_BN)
        # memory, links, precedence
        torch.mul(memory_BNM, erase, out=scratch_BNM)
        memory_BNM.addcmul_(new_BI1, scratch_BNM, value=-1)
        torch.baddbmm(memory_BNM, new_BI1, vector, out=memory_BNM)  # not baddbmm_, which torch's FLOP counter ignores
        torch.sub(one, new_BN, out=spare_BN)
        links_BIN.mul_(torch.sub(spare_BI1, new_B1N, out=scratch_BIN)).addcmul_(new_BI1, recent_B1N)
        diagonal_BN.zero_()
        torch.sub(one, torch.sum(new_BN, -1, keepdim=True, out=spare_B1), out=spare_B1)
        torch.addcmul(new_BN, recent_BN, spare_B1, out=newest_BN)
        # where to read: backward, by content, forward
        torch.mul(torch.bmm(read_BRN, links_BIN, out=behind_BRN), ways[0], out=behind_BRN)
        torch.bmm(read_BRN, links_BNI, out=ahead_BRN)
        similar_BRN = to_read.forward(memory_BNM, memory_BMN, read_keys, read_strengths)
        torch.addcmul(behind_BRN, similar_BRN, ways[1], out=new_BRN).addcmul_(ahead_BRN, ways[2])
        torch.bmm(new_BRN, memory_BNM, out=r_BRM)
        torch.cat((h_BH, r_BF), dim=1, out=y_BF)
        if keep:
            gates_BG.copy_(controller.gates_BG)
            kept_BS.copy_(told_BS)
        past_BF, c_BH, usage_BN, write_BN, recent_BN, recent_B1N = y_BF, new_BH, used_BN, new_BN, newest_BN, newest_B1N
        read_BRN = new_BRN
    lasts = made.c_BH, made.usage_BN, made.write_BN, made.recent_BN, made.read_BRN
    for into, last in zip(lasts, (c_BH, usage_BN, write_BN, recent_BN, read_BRN), strict=True):
        into.copy_(last)
    return made


_LOOP = Loop("dnc", Given, Made, _forward, backward, _shapes, outputs=8, numbers=1)
