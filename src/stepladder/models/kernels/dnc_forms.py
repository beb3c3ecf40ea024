"""What the loop of kernels.dnc is given and makes, where things stand in what the heads are told, and allocation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.models.addressing import TINY
from stepladder.models.kernels.heads import softplus_slope


class Given(NamedTuple):
    """What the loop is given.

    x_TBG: W x + b. recur, tell, bias: the maps of [h; r] to the gates and of h to the heads. start_NM: the memory where
    ``reset_TB``; all else is 0 there. past_BF = [h; r] and what follows it: before the first token. All of one type,
    float32 or wider.
    """

    x_TBG: Tensor
    recur_GF: Tensor
    tell_SH: Tensor
    bias_S: Tensor
    start_NM: Tensor
    reset_TB: Tensor
    past_BF: Tensor
    c_BH: Tensor
    memory_BNM: Tensor
    usage_BN: Tensor
    write_BN: Tensor
    recent_BN: Tensor
    links_BIN: Tensor
    read_BRN: Tensor


class Made(NamedTuple):
    """[h; r] of all tokens; the state after the last. Kept: weights to links."""

    y_TBF: Tensor
    c_BH: Tensor
    memory_BNM: Tensor
    usage_BN: Tensor
    write_BN: Tensor
    recent_BN: Tensor
    links_BIN: Tensor
    read_BRN: Tensor
    read_TBRN: Tensor
    write_TBN: Tensor
    usage_TBN: Tensor
    recent_TBN: Tensor
    gates_TBG: Tensor
    c_TBH: Tensor
    told_TBS: Tensor
    memory_KBNM: Tensor
    links_KBIN: Tensor


def told_sizes(reads: int, slot_width: int) -> list[int]:
    """How many numbers the heads are told: gates to free, allocate, write; erasure, strengths, modes, keys, content."""
    return [reads, 1, 1, slot_width, 1 + reads, 3 * reads, (1 + reads) * slot_width, slot_width]


class Sizes:
    """Where things stand in what the heads are told, (..., S)."""

    def __init__(self, reads: int, slot_width: int) -> None:
        self.reads, self.slot_width = reads, slot_width
        self.sizes = told_sizes(reads, slot_width)

    def split(self, told: Tensor) -> tuple[Tensor, ...]:
        """Views, in the order of ``sizes``; the strengths less 1. Keys (1 + R, M)."""
        free, allocate, gate, erase, strengths, modes, keys, vector = told.split(self.sizes, dim=-1)
        modes, keys = modes.unflatten(-1, (self.reads, 3)), keys.unflatten(-1, (1 + self.reads, -1))
        return free, allocate, gate, erase[..., None, :], strengths, modes, keys, vector[..., None, :]

    def kinds(self, told: Tensor) -> tuple[Tensor, Tensor]:
        """What goes through a sigmoid and through softplus: views of (..., S)."""
        sigmoids = sum(self.sizes[:4])
        return told[..., :sigmoids], told[..., sigmoids : sigmoids + self.sizes[4]]

    def slopes(self, told: Tensor) -> Tensor:
        """By what gradients go back through those maps; frees and erasures take away; all else: 1."""
        found = torch.ones_like(told)
        (sigmoids, positive), (to_sigmoids, to_positive) = self.kinds(told), self.kinds(found)
        torch.mul(sigmoids, 1 - sigmoids, out=to_sigmoids)
        to_sigmoids[..., : self.reads].neg_()
        to_sigmoids[..., self.reads + 2 :].neg_()
        to_positive.copy_(softplus_slope(positive))
        return found


class Allot:
    """Weights on free slots: mixers.dnc.allocation."""

    def __init__(self, usage_BN: Tensor) -> None:
        self.sorted_BN, self.order_BN = torch.empty_like(usage_BN), torch.empty_like(usage_BN, dtype=torch.int64)
        self.through_BN, self.found_BN, self.w_BN = (torch.empty_like(usage_BN) for _ in range(3))
        self.behind_BN, self.before_BN = self.found_BN[:, 1:], self.through_BN[:, :-1]
        slots, self.one = usage_BN.shape[1], usage_BN.new_ones(1, 1)
        self.later_NN = usage_BN.new_ones(slots, slots).tril(-1)
        self.d_BN, self.at_BN = torch.empty_like(usage_BN), torch.empty_like(usage_BN)

    def forward(self, usage_BN: Tensor) -> Tensor:
        """The weights, in an array that the next call fills anew."""
        torch.sort(usage_BN, dim=-1, stable=True, out=(self.sorted_BN, self.order_BN))
        torch.sub(self.one, self.sorted_BN, out=self.found_BN)
        torch.cumprod(self.sorted_BN.add_(TINY), -1, out=self.through_BN)
        self.behind_BN.mul_(self.before_BN)
        return self.w_BN.scatter_(1, self.order_BN, self.found_BN)

    @staticmethod
    def ready(usage_CBN: Tensor) -> list[Tensor]:
        """What ``back`` is given, for a chunk: the weights first, then four in sorted order."""
        sorted_CBN, order_CBN = usage_CBN.sort(dim=-1, stable=True)
        safe_CBN = sorted_CBN + TINY
        before_CBN = torch.ones_like(sorted_CBN)
        before_CBN[..., 1:] = safe_CBN.cumprod(-1)[..., :-1]
        found_CBN = (1 - sorted_CBN) * before_CBN
        weights_CBN = torch.empty_like(found_CBN).scatter_(-1, order_CBN, found_CBN)
        return [weights_CBN, order_CBN, found_CBN, before_CBN, safe_CBN.reciprocal_()]

    def back(self, dw_BN: Tensor, ready: Sequence[Tensor]) -> Tensor:
        """The gradient of the usage. A slot's usage lowers its own weight, and raises that of all slots behind it."""
        _, order_BN, found_BN, before_BN, inverse_BN = ready
        torch.gather(dw_BN, 1, order_BN, out=self.at_BN)
        torch.mm(torch.mul(self.at_BN, found_BN, out=self.d_BN), self.later_NN, out=self.through_BN)
        torch.mul(self.through_BN, inverse_BN, out=self.d_BN).addcmul_(self.at_BN, before_BN, value=-1)
        return self.w_BN.scatter_(1, order_BN, self.d_BN)
