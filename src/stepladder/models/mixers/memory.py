"""A segment-recurrent memory: a few tokens that sum up the document so far, written and read by attention.

A document is cut into segments of a fixed number of tokens, counted from its first token: token p is in segment
p // segment. When a segment ends, the memory attends to its tokens and is updated; the tokens of the next segment
attend to the memory. What a token reads was written before its segment began, so nothing sees the future.

Rows stand at different positions of their documents, so segments end at different places of a chunk. An *event* is
the end of a segment. A chunk of T tokens has room for ceil(T / segment) of them a row, however rows stand; event
number e of all rows is computed at once, and rows that have none keep their memory. All shapes follow from T.

Suffixes: B batch, T tokens, D width, H heads, K head width, M memory tokens, E events, W a window of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.layers import linear, norm


@dataclass(frozen=True)
class Remembered:
    """memory_BMD: as the document's last event left it, 0 before the first.

    recent_BWF: keys and values (F = 2D) of the last segment - 1 tokens, of whatever document.
    """

    memory_BMD: Tensor
    recent_BWF: Tensor


class SegmentMemory(Part):
    """gate * out( attention of a token to m_{c-1} ), c its segment; 0 in a document's first segment.

    m_c = norm( m_{c-1} + write_out( attention of m_{c-1} to the tokens of segment c ) ), m_{-1} learned. The norm
    bounds the memory and lets what is old fade, however long the document. ``gate``, a learned scalar, starts at 0.
    """

    def __init__(self, width: int, heads: int, memory: int, segment: int, gain: float) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"{heads} heads of the memory do not divide width {width}; choose a divisor")
        self.heads, self.memory, self.segment = heads, memory, segment
        self.first_MD = nn.Parameter(torch.empty(memory, width).normal_())
        self.write_query, self.write_key_value = linear(width, width), linear(width, 2 * width)
        self.write_out, self.norm = linear(width, width), norm(width)
        self.read_query, self.read_key_value = linear(width, width), linear(width, 2 * width)
        self.read_out, self.gate = linear(width, width, gain), nn.Parameter(torch.zeros(()))

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        tokens = x_BTD.shape[1]
        if state is None:
            state = self._start(len(x_BTD), x_BTD.device, x_BTD.dtype)
        segment_BT = ctx.positions_BT // self.segment
        ends_BT = ctx.positions_BT % self.segment == self.segment - 1
        so_far_BT = ends_BT.cumsum(1)
        events = -(-tokens // self.segment)
        number_BE = torch.arange(1, events + 1, device=x_BTD.device).repeat(len(x_BTD), 1)
        when_BE = torch.searchsorted(so_far_BT, number_BE)  # the time of a row's event of that number; T if it has none

        written_BTF = self.write_key_value(x_BTD)
        recent_BWF = torch.cat((state.recent_BWF.to(written_BTF.dtype), written_BTF), dim=1)
        # What a finished document left behind is never read: fill it, so that not even an infinity gets through.
        carried_BMD = state.memory_BMD.masked_fill((segment_BT[:, 0] == 0)[:, None, None], 0.0)
        versions_BEMD = self._write(carried_BMD, recent_BWF, when_BE, segment_BT)
        y_BTD = self._read(x_BTD, versions_BEMD, when_BE, so_far_BT - ends_BT.long())
        y_BTD = self.gate * self.read_out(y_BTD.masked_fill((segment_BT == 0)[..., None], 0.0))
        # A memory of an earlier document is out of force; carried as 0, so that a state tells what will matter.
        none_yet_B = ctx.positions_BT[:, -1] + 1 < self.segment
        return y_BTD, Remembered(
            versions_BEMD[:, -1].masked_fill(none_yet_B[:, None, None], 0.0), recent_BWF[:, tokens:]
        )

    def _write(self, memory_BMD: Tensor, recent_BWF: Tensor, when_BE: Tensor, segment_BT: Tensor) -> Tensor:
        """The memory before all events and after each of them, (B, 1 + E, M, D)."""
        tokens = segment_BT.shape[1]
        # The token at time t of this call is at t + segment - 1 of recent: a window begins at its event's own time.
        window_BEWF = _windows(recent_BWF, when_BE, self.segment)
        some_BE = when_BE < tokens
        window_BEWF = window_BEWF.masked_fill(~some_BE[..., None, None], 0.0)
        opening_BE = segment_BT.gather(1, when_BE.clamp(max=tokens - 1)) == 0
        versions = [memory_BMD]
        for event in range(when_BE.shape[1]):
            some, opening = (each[:, event, None, None] for each in (some_BE, opening_BE))
            before_BMD = torch.where(opening, self.first_MD.to(memory_BMD.dtype), versions[-1])
            heard_BMD = self._attend(self.write_query(before_BMD), window_BEWF[:, event])
            after_BMD = self.norm(before_BMD + self.write_out(heard_BMD))
            versions.append(torch.where(some, after_BMD, versions[-1]))
        return torch.stack(versions, dim=1)

    def _read(self, x_BTD: Tensor, versions_BEMD: Tensor, when_BE: Tensor, version_BT: Tensor) -> Tensor:
        """Every token's attention to the version of the memory in force; what first segments get is meaningless.

        A version is read by at most ``segment`` tokens in a row, those behind its event: attention goes window by
        window, so its cost is linear in the tokens.
        """
        tokens = x_BTD.shape[1]
        size = min(self.segment, tokens)
        begin_BE = F.pad(when_BE + 1, (1, 0))
        query_BEWD = _windows(self.read_query(x_BTD), begin_BE, size)
        key_value_BEMF = self.read_key_value(versions_BEMD)
        y_BWD = self._attend(query_BEWD.flatten(0, 1), key_value_BEMF.flatten(0, 1)).unflatten(0, begin_BE.shape)
        offset_BT = torch.arange(tokens, device=x_BTD.device) - begin_BE.gather(1, version_BT)
        place_BT = version_BT * size + offset_BT.clamp(max=size - 1)  # first segments may be out of their window
        return y_BWD.flatten(1, 2).gather(1, place_BT[..., None].expand_as(x_BTD))

    def _attend(self, query_BQD: Tensor, key_value_BSF: Tensor) -> Tensor:
        """Softmax attention of all queries to all keys, in heads."""
        heads = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in key_value_BSF.chunk(2, dim=-1))
        query_BHQK = query_BQD.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(query_BHQK, *heads).transpose(1, 2).flatten(2)

    def _start(self, batch: int, device: torch.device, dtype: torch.dtype) -> Remembered:
        width = self.first_MD.shape[1]
        shapes = (self.memory, width), (self.segment - 1, 2 * width)
        return Remembered(*(torch.zeros(batch, *shape, device=device, dtype=dtype) for shape in shapes))

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        """The state does not grow, so ``capacity`` means nothing here."""
        return self._start(batch, device, dtype)

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """FLOPs as executed: every event there is room for, and full windows."""
        width = self.first_MD.shape[1]
        events, size = -(-context // self.segment), min(self.segment, context)
        square = 2 * width * width
        update = 2 * self.memory * square + 4 * self.memory * self.segment * width
        version = 2 * self.memory * square + 4 * self.memory * size * width
        flops = 4 * square + (events * update + (events + 1) * version) / context
        state = (self.memory + 2 * (self.segment - 1)) * width * self.itemsize()
        return Cost(self.own_params(), flops, state)


def _windows(x_BTF: Tensor, begin_BE: Tensor, size: int) -> Tensor:
    """``size`` entries of x from every ``begin`` on, (B, E, size, F); beyond the end, the last one again."""
    index_BEW = (begin_BE[..., None] + torch.arange(size, device=x_BTF.device)).clamp(max=x_BTF.shape[1] - 1)
    flat = index_BEW.flatten(1)[..., None].expand(-1, -1, x_BTF.shape[-1])
    return x_BTF.gather(1, flat).unflatten(1, index_BEW.shape[1:])
