"""Chunks that are counted from a document's first token, in rows that stand at different places of their documents.

Chunks are counted from a document's first token, and rows stand at different places of theirs. In a call a row has
tokens of two kinds. *Fresh* ones are in the first chunk of a document that begins in this call: their gradients are
taken at the learned M_0, which all rows and documents share, so all of them are computed at once. The others continue
a *version*: version 0 is the memory that the call was given, version e the memory behind the row's e-th chunk that
ends in this call. A version is continued by at most ``chunk`` tokens, those behind its event; number e of all rows is
computed at once, and what a row has not is masked. All shapes follow from T.

A call at the start of a sequence without document ids is one document in every row, and needs none of this.

Suffixes: B batch, H heads, T tokens, E events, W tokens of a window, F numbers of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the chunks of all rows are in a call.

    start_BT: index of the first token of each token's document, negative if it was in an earlier call. version_BT: of
    its row's chunks, how many have ended before a token. when_BE: index of the e-th token that ends a chunk; T if none.
    size: tokens of a window, those of a chunk or all there are.
    """

    positions_BT: Tensor
    start_BT: Tensor
    version_BT: Tensor
    when_BE: Tensor
    chunk: int
    size: int

    @classmethod
    def of(cls, positions_BT: Tensor, chunk: int, begins: bool) -> Layout:
        """``begins``: the call starts its sequences, so that no open chunk comes with it."""
        count = positions_BT.shape[1]
        ends_BT = (positions_BT + 1) % chunk == 0
        so_far_BT = ends_BT.cumsum(1)
        events = count // chunk if begins else -(-count // chunk)
        number_BE = torch.arange(1, events + 1, device=positions_BT.device).repeat(len(positions_BT), 1)
        start_BT = torch.arange(count, device=positions_BT.device) - positions_BT
        when_BE = torch.searchsorted(so_far_BT, number_BE)
        return cls(positions_BT, start_BT, so_far_BT - ends_BT.long(), when_BE, chunk, min(chunk, count))

    @property
    def events(self) -> int:
        """Chunks that may end in a row."""
        return self.when_BE.shape[1]

    def version(self, number: int) -> tuple[Tensor, Tensor]:
        """The tokens that may continue version ``number``: their indices (B, W), and which of them do."""
        index_BW, inside_BW = self._window(self._behind(number))
        start_BW = self.start_BT.gather(1, index_BW)
        if number:
            own_B1 = self.start_BT.gather(1, self.when_BE[:, number - 1, None].clamp(max=self.start_BT.shape[1] - 1))
        else:
            own_B1 = self.start_BT[:, :1].clamp(max=-1)  # a document that begins here continues nothing
        return index_BW, inside_BW & (self.version_BT.gather(1, index_BW) == number) & (start_BW == own_B1)

    def event(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of event ``number``: whether a row has it, whether its chunk is fresh, its document's chunks so far (B,)."""
        when_B1 = self.when_BE[:, number, None]
        some_B1, when_B1 = when_B1 < self.start_BT.shape[1], when_B1.clamp(max=self.start_BT.shape[1] - 1)
        place_B1 = self.positions_BT.gather(1, when_B1)
        opening_B1 = some_B1 & (place_B1 < self.chunk) & (self.start_BT.gather(1, when_B1) >= 0)
        return some_B1[:, 0], opening_B1[:, 0], place_B1[:, 0] // self.chunk + 1

    def until(self, last_B: Tensor, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """The window that ends with token ``last``, of that token's document only, in the rows ``rows``."""
        last_B1 = last_B[:, None].clamp(max=self.start_BT.shape[1] - 1)
        index_BW, inside_BW = self._window(last_B1 - self.size + 1)
        same_BW = self.start_BT.gather(1, index_BW) == self.start_BT.gather(1, last_B1)
        return index_BW, inside_BW & same_BW & rows_B[:, None]

    def ending(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that end in an open chunk whose tokens are fresh, and those tokens."""
        count = self.start_BT.shape[1]
        open_B = (self.start_BT[:, -1] >= 0) & (self.positions_BT[:, -1] < self.chunk - 1)
        return open_B, *self.until(torch.full_like(self.start_BT[:, 0], count - 1), open_B)

    @property
    def fresh(self) -> Tensor:
        """The tokens in the first chunk of a document that begins in this call."""
        return (self.positions_BT < self.chunk) & (self.start_BT >= 0)

    def slots(self, begins: bool) -> tuple[Tensor, Tensor]:
        """Where a token is among the windows of all versions, one behind the other; and whether it is fresh instead."""
        count = self.start_BT.shape[1]
        behind_BE = torch.cat([self._behind(number) for number in range(self.events + 1)], dim=1)
        offset_BT = torch.arange(count, device=self.start_BT.device) - behind_BE.gather(1, self.version_BT)
        slot_BT = (self.version_BT - int(begins)) * self.size + offset_BT.clamp(max=self.size - 1)
        return slot_BT.clamp(min=0), self.fresh

    def _behind(self, number: int) -> Tensor:
        """Index of the first token behind an event (B, 1); of the first token for 0."""
        return torch.zeros_like(self.start_BT[:, :1]) if number == 0 else self.when_BE[:, number - 1, None] + 1

    def _window(self, begin_B1: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of ``size`` tokens from ``begin`` on, kept inside the call; and which needed no keeping."""
        index_BW = begin_B1 + torch.arange(self.size, device=begin_B1.device)
        kept_BW = index_BW.clamp(0, self.start_BT.shape[1] - 1)
        return kept_BW, kept_BW == index_BW


class Slice:
    """Some tokens next to one another, the same in every row."""

    def __init__(self, place: int, size: int) -> None:
        self.place, self.size = place, size

    def __call__(self, x_BHT: Tensor) -> Tensor:
        return x_BHT[:, :, self.place : self.place + self.size]


class Gather:
    """Tokens by index, 0 where they are not real: a fill, so that nothing gets through."""

    def __init__(self, index_BW: Tensor, real_BW: Tensor) -> None:
        self.index_BW, self.real_BW = index_BW, real_BW

    def __call__(self, x_BHT: Tensor) -> Tensor:
        shape = (len(self.index_BW), 1, self.index_BW.shape[1], *(1,) * (x_BHT.dim() - 3))
        index = self.index_BW.view(shape).expand(-1, x_BHT.shape[1], -1, *x_BHT.shape[3:])
        return x_BHT.gather(2, index).masked_fill(~self.real_BW.view(shape), 0)


Pick = Callable[[Tensor], Tensor]
"""(B, H, T, ...) to the tokens of a window, (B, H, W, ...)."""


def blocks(x: Tensor, axis: int, back: int, size: int) -> Tensor:
    """(B, ..., T, ...) to (B x blocks, ..., back + size, ...): blocks of ``size`` tokens with ``back`` before each."""
    x = x.movedim(axis, 1)
    rest = -x.shape[1] % size
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (back, rest))
    return x.unfold(1, back + size, size).flatten(0, 1).movedim(-1, axis)


def unblocked(y: Tensor, count: int) -> Tensor:
    """(B x blocks, H, size, F) back to (B, H, T, F)."""
    return y.unflatten(0, (-1, -(-count // y.shape[2]))).transpose(1, 2).flatten(2, 3)[:, :, :count]
