"""Titans' neural memory as a mixer (Behrouz, Zhong & Mirrokni, 2025): mixers.fast_weights has the equations.

Chunks are counted from a document's first token, and rows stand at different places of theirs. In a call a row has
tokens of two kinds. *Fresh* ones are in the first chunk of a document that begins in this call: their gradients are
taken at the learned M_0, which all rows and documents share, so all of them are computed at once. The others continue
a *version*: version 0 is the memory that the call was given, version e the memory behind the row's e-th chunk that
ends in this call. A version is continued by at most ``chunk`` tokens, those behind its event; number e of all rows is
computed at once, and what a row has not is masked. All shapes follow from T.

A call at the start of a sequence without document ids is one document in every row, and needs none of this.

Suffixes: B batch, T tokens, D model width, H heads, K head width, E events, W tokens of a window, F numbers of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.layers import linear, no_autocast, norm
from stepladder.models.mixers.decay import ShortConvolution
from stepladder.models.mixers.fast_weights import (
    Memory,
    Tokens,
    Weights,
    decays,
    errors,
    read,
    token_by_token,
    write,
)

RATE_BIAS, FORGET_BIAS = -2.0, -5.0
"""Initial biases of theta and alpha: small steps, slow forgetting. That of eta is 0."""


@dataclass(frozen=True)
class Carried:
    """What a sequence carries: the last inputs of the convolution, and the memory in float32 or wider."""

    inputs_BLU: Tensor
    memory: Memory


class NeuralMemory(Part):
    """out( norm(y) * silu z ), y = M_t(q_t) per head; (q, k, v) = silu(conv(...)), q and k of length 1.

    layers: of the memory network, 1 = a matrix, whose M_0 starts at 0. expand: its hidden width in head widths.
    rate: largest theta. momentum, forget: whether there are eta and alpha. bound: see fast_weights.errors. horizon:
    chunks of a document after which gradients stop, 0 = never. Source and differences: zoo.titans.
    """

    site: int = 0

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        *,
        layers: int,
        expand: int,
        conv: int,
        rate: float,
        momentum: bool,
        forget: bool,
        bound: float,
        horizon: int,
        scan: Literal["chunked", "naive"],
        chunk: int,
        gain: float,
    ) -> None:
        super().__init__()
        self.heads, self.head_width, self.scan, self.chunk = heads, head_width, scan, chunk
        self.rate, self.momentum, self.forget, self.bound, self.horizon = rate, momentum, forget, bound, horizon
        inner, gates = heads * head_width, 1 + momentum + forget
        self.sizes = (3 * inner, inner, heads * gates)
        self.project = linear(width, sum(self.sizes))
        biases = [RATE_BIAS] + [0.0] * momentum + [FORGET_BIAS] * forget
        self.bias = nn.Parameter(torch.tensor(biases).repeat_interleave(heads))
        self.conv = ShortConvolution(3 * inner, conv)
        widths = [head_width, *[expand * head_width] * (layers - 1), head_width]
        self.first = nn.ParameterList(
            torch.randn(heads, o, i) * (0.0 if layers == 1 else i**-0.5) for i, o in pairwise(widths)
        )
        self.norm = norm(head_width)
        self.out = linear(inner, width, gain)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        u_BTU, gate, told = self.project(x_BTD).split(self.sizes, dim=-1)
        qkv, inputs_BLU = self.conv(u_BTU, None if state is None else state.inputs_BLU, ctx)
        with no_autocast(x_BTD.device):  # a memory is kept in float32 whatever the other products are made in
            tokens = self._tokens(qkv, told, ctx)
            y_BHTK, memory = self.run(tokens, None if state is None else state.memory, ctx)
        if ctx.tracing:
            norms = [w.square().flatten(1).sum(1) for w in memory.now]
            ctx.note(f"memory{self.site}.norm", torch.stack(norms).sum(0).sqrt())
        y_BTHK = self.norm(y_BHTK.transpose(1, 2).to(self.norm.weight.dtype))
        return self.out((y_BTHK * F.silu(gate).unflatten(-1, (self.heads, -1))).flatten(2)), Carried(inputs_BLU, memory)

    def _tokens(self, qkv_BTU: Tensor, told: Tensor, ctx: Context) -> Tokens:
        """Keys, queries, values and gates, in float32 or wider."""
        wide = torch.promote_types(qkv_BTU.dtype, torch.float32)
        q, k, v = qkv_BTU.to(wide).unflatten(-1, (3, self.heads, self.head_width)).permute(2, 0, 3, 1, 4)
        gates = iter((told.to(wide) + self.bias.to(wide)).unflatten(-1, (-1, self.heads)).permute(2, 0, 3, 1))
        rate = self.rate * next(gates).sigmoid()
        glide = F.logsigmoid(next(gates)) if self.momentum else None
        keep = F.logsigmoid(-next(gates)) if self.forget else torch.zeros_like(rate)
        real = torch.ones_like(ctx.positions_BT, dtype=torch.bool)
        return Tokens(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, rate, keep, glide, real)

    def run(self, tokens: Tokens, memory: Memory | None, ctx: Context) -> tuple[Tensor, Memory]:
        """y (B, H, T, K) of all tokens, and the memory after them."""
        wide = tokens.q.dtype
        first = tuple(weight.to(wide) for weight in self.first)
        batch, _, count, _ = tokens.q.shape
        if self.scan == "naive" or count == 1:
            begun = self._start(batch, tokens.q.device, wide) if memory is None else memory
            return token_by_token(first, begun, tokens, ctx.positions_BT, self.chunk, self.bound, self.horizon)
        if memory is None and not ctx.packed:
            return self._one_document(first, tokens, ctx)
        return self._documents(first, tokens, memory, ctx)

    def _one_document(self, first: Weights, tokens: Tokens, ctx: Context) -> tuple[Tensor, Memory]:
        """Every row is one document from its first token on: chunk after chunk."""
        none = tuple(torch.zeros_like(weight) for weight in first) if self.momentum else ()
        memory, found = Memory(first, first, none), []
        for number, place in enumerate(range(0, tokens.q.shape[2], self.chunk)):
            window = _slice(tokens, place, self.chunk)
            y, memory = self._advance(memory, window, ctx)
            found.append(y)
            if window.q.shape[2] == self.chunk:
                memory = self._cut(replace(memory, base=memory.now), (number + 1) % max(self.horizon, 1) == 0)
        return torch.cat(found, dim=2), memory.map(lambda w: w if w.dim() == 4 else w.expand(len(y), *w.shape))

    def _documents(self, first: Weights, tokens: Tokens, given: Memory | None, ctx: Context) -> tuple[Tensor, Memory]:
        """Rows of documents, each wherever it is: fresh tokens, then version after version."""
        at = Layout.of(ctx.positions_BT, self.chunk, given is None)
        fresh_BHTK, heard, deltas = self._fresh(first, tokens, at)
        none = tuple(torch.zeros_like(weight) for weight in first) if self.momentum else ()
        learned = Memory(first, first, none)
        if given is None:
            memory = self._start(len(ctx.positions_BT), tokens.q.device, tokens.q.dtype)
        else:  # what a finished document left behind, be it infinite, is gone
            gone = (ctx.positions_BT[:, 0] == 0)[:, None, None, None]
            memory = given.map(lambda w: w.masked_fill(gone, 0.0))
        found = []
        for number in range(at.events + 1):
            if number or given is not None:
                index_BW, real_BW = at.version(number)
                y, memory = self._advance(memory, _gather(tokens, index_BW, real_BW), ctx)
                found.append(y)
            if number == at.events:
                break
            some_B, opening_B, cut_B = at.event(number, self.horizon)
            after = memory
            if at.size == self.chunk:  # else no chunk both begins and ends in this call
                index_BW, real_BW = at.until(at.when_BE[:, number], opening_B)
                after = _choose(opening_B, self._written(learned, tokens, heard, deltas, index_BW, real_BW), memory)
            memory = _choose(some_B, self._cut(replace(after, base=after.now), cut_B), memory)
        open_B, index_BW, real_BW = at.ending()
        fresh = self._written(learned, tokens, heard, deltas, index_BW, real_BW)
        memory = _choose(open_B, fresh, memory)
        if not found:
            return fresh_BHTK, memory
        slot_BT, fresh_BT = at.slots(given is None)
        index = slot_BT[:, None, :, None].expand(-1, self.heads, -1, self.head_width)
        y_BHTK = torch.cat(found, dim=2).gather(2, index)
        return torch.where(fresh_BT[:, None, :, None], fresh_BHTK, y_BHTK), memory

    def _advance(self, memory: Memory, window: Tokens, ctx: Context) -> tuple[Tensor, Memory]:
        """Read and write the tokens of a window, all of one chunk; recomputed in the backward pass if so asked."""

        def step(memory: Memory, window: Tokens) -> tuple[Tensor, Memory]:
            heard, deltas = errors(memory.base, window.k, window.v, self.bound)
            one_document = torch.zeros_like(window.real, dtype=torch.int64)
            within = decays(window, one_document, window.q.shape[2])
            return read(memory, window.q, heard, deltas, within), write(memory, heard, deltas, within)

        if ctx.recompute and torch.is_grad_enabled():
            return checkpoint(step, memory, window, use_reentrant=False, preserve_rng_state=False)
        return step(memory, window)

    def _fresh(self, first: Weights, tokens: Tokens, at: Layout) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Reads of all tokens as if they were fresh (others: anything), and the rows of their gradients at M_0.

        In blocks of at most a chunk of tokens, each with the block before it: a first chunk is no longer.
        """
        heard, deltas = errors(first, tokens.k, tokens.v, self.bound)
        size, count = at.size, tokens.q.shape[2]
        blocks = -(-count // size)

        def cut(x: Tensor, axis: int, back: int) -> Tensor:
            """(..., T, ...) to (B x blocks, ..., back + size, ...): the blocks, with ``back`` tokens before each."""
            x = x.movedim(axis, 1)
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (back, blocks * size - count))
            return x.unfold(1, back + size, size).flatten(0, 1).movedim(-1, axis)

        def both(x: Tensor) -> Tensor:
            return cut(x, 2, size)

        rows = tokens.map(both, cut(tokens.real.long(), 1, size).bool())
        document_BN = cut(at.start_BT + 1, 1, size)  # 0 is the document of the padding
        within, learned = decays(rows, document_BN, size), Memory(first, first, ())
        y = read(learned, rows.q[:, :, size:], [both(a) for a in heard], [both(d) for d in deltas], within)
        y_BHTK = y.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :count]
        return y_BHTK, heard, deltas

    def _written(
        self,
        learned: Memory,
        tokens: Tokens,
        heard: list[Tensor],
        deltas: list[Tensor],
        index_BW: Tensor,
        real_BW: Tensor,
    ) -> Memory:
        """M_0 after the tokens of a window, whose gradient rows are known."""
        window = _gather(tokens, index_BW, real_BW)
        within = decays(window, torch.zeros_like(index_BW), 1)
        heard, deltas = ([_rows(each, index_BW, real_BW) for each in some] for some in (heard, deltas))
        after = write(learned, heard, deltas, within)
        return replace(after, base=tuple(w.expand_as(n) for w, n in zip(learned.base, after.now, strict=True)))

    def _cut(self, memory: Memory, cut: Tensor | bool) -> Memory:
        """The memory, detached (in the rows) where ``cut``, if there is a horizon."""
        if self.horizon == 0 or cut is False:
            return memory
        detached = memory.map(Tensor.detach)
        return detached if cut is True else _choose(cut, detached, memory)

    def _start(self, batch: int, device: torch.device, dtype: torch.dtype) -> Memory:
        """Zeros: what stands for M_0 until a document's first token brings it."""
        wide = torch.promote_types(dtype, torch.float32)
        zero = tuple(torch.zeros(batch, *weight.shape, device=device, dtype=wide) for weight in self.first)
        return Memory(zero, zero, zero if self.momentum else ())

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        """The state does not grow, so ``capacity`` means nothing here."""
        return Carried(self.conv.start(batch, device, dtype), self._start(batch, device, dtype))

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """One document in every row. A row of documents costs up to twice the memory's part (docs/nested.md)."""
        matrices = self.project.weight.numel() + self.out.weight.numel()
        weights = sum(weight.numel() for weight in self.first)
        deep, copies = weights - self.first[0].numel(), 2 if self.momentum else 1
        edges = sum(sum(weight.shape[1:]) for weight in self.first)
        scan = 0
        for size, count in ((self.chunk, context // self.chunk), (context % self.chunk, 1)):
            if self.scan == "naive" or context == 1:
                scan += count * size * 2 * (2 * weights + deep)
            elif size:
                pairs = 2 * size * size * edges + (2 * size**3 + 2 * size * size if self.momentum else 0)
                scan += count * (2 * size * (weights + deep + 2 * copies * weights) + self.heads * pairs)
        carried = (len(self.conv.weight) - 1) * self.sizes[0] * self.itemsize()
        carried += (1 + copies) * weights * max(4, self.itemsize())
        return Cost(self.own_params(), 2 * matrices + scan / context, carried)


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

    def event(self, number: int, horizon: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of event ``number``: whether a row has it, whether its chunk is fresh, whether gradients stop there (B,)."""
        when_B1 = self.when_BE[:, number, None]
        some_B1, when_B1 = when_B1 < self.start_BT.shape[1], when_B1.clamp(max=self.start_BT.shape[1] - 1)
        place_B1 = self.positions_BT.gather(1, when_B1)
        opening_B1 = some_B1 & (place_B1 < self.chunk) & (self.start_BT.gather(1, when_B1) >= 0)
        cut_B1 = (place_B1 // self.chunk + 1) % max(horizon, 1) == 0
        return some_B1[:, 0], opening_B1[:, 0], cut_B1[:, 0]

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

    def slots(self, begins: bool) -> tuple[Tensor, Tensor]:
        """Where a token is among the windows of all versions, one behind the other; and whether it is fresh instead."""
        count = self.start_BT.shape[1]
        behind_BE = torch.cat([self._behind(number) for number in range(self.events + 1)], dim=1)
        offset_BT = torch.arange(count, device=self.start_BT.device) - behind_BE.gather(1, self.version_BT)
        slot_BT = (self.version_BT - int(begins)) * self.size + offset_BT.clamp(max=self.size - 1)
        return slot_BT.clamp(min=0), (self.positions_BT < self.chunk) & (self.start_BT >= 0)

    def _behind(self, number: int) -> Tensor:
        """Index of the first token behind an event (B, 1); of the first token for 0."""
        return torch.zeros_like(self.start_BT[:, :1]) if number == 0 else self.when_BE[:, number - 1, None] + 1

    def _window(self, begin_B1: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of ``size`` tokens from ``begin`` on, kept inside the call; and which needed no keeping."""
        index_BW = begin_B1 + torch.arange(self.size, device=begin_B1.device)
        kept_BW = index_BW.clamp(0, self.start_BT.shape[1] - 1)
        return kept_BW, kept_BW == index_BW


def _slice(tokens: Tokens, place: int, size: int) -> Tokens:
    return tokens.map(lambda x: x[:, :, place : place + size], tokens.real[:, place : place + size])


def _rows(x_BHT: Tensor, index_BW: Tensor, real_BW: Tensor) -> Tensor:
    """x (B, H, T, ...) at ``index``, 0 where not ``real``: a fill, so that nothing gets through."""
    shape = (len(index_BW), 1, index_BW.shape[1], *(1,) * (x_BHT.dim() - 3))
    index = index_BW.view(shape).expand(-1, x_BHT.shape[1], -1, *x_BHT.shape[3:])
    return x_BHT.gather(2, index).masked_fill(~real_BW.view(shape), 0.0)


def _gather(tokens: Tokens, index_BW: Tensor, real_BW: Tensor) -> Tokens:
    """A window of tokens; those that are not real neither write nor let anything decay."""
    return tokens.map(lambda x: _rows(x, index_BW, real_BW), real_BW)


def _where(rows_B: Tensor, yes: Weights, no: Weights) -> Weights:
    return tuple(torch.where(rows_B[:, None, None, None], a, b) for a, b in zip(yes, no, strict=True))


def _choose(rows_B: Tensor, yes: Memory, no: Memory) -> Memory:
    """Row by row, one memory or the other."""
    pairs = ((yes.base, no.base), (yes.now, no.now), (yes.momentum, no.momentum))
    return Memory(*(_where(rows_B, *pair) for pair in pairs))
