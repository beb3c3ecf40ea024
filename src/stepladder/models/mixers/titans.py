"""Titans' neural memory as a mixer (Behrouz, Zhong & Mirrokni, 2025): mixers.fast_weights has the equations.

How the chunks of all rows are computed together: mixers.chunks.

Suffixes: B batch, T tokens, D model width, H heads, K head width, W tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.layers import linear, no_autocast, norm
from stepladder.models.mixers.chunks import Gather, Layout, Pick, Slice, blocks, unblocked
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
        batch, _, count, _ = tokens.q.shape
        if self.scan == "naive" or count == 1:
            wide = tokens.q.dtype
            first = tuple(weight.to(wide) for weight in self.first)
            begun = self._start(batch, tokens.q.device, wide) if memory is None else memory
            return token_by_token(first, begun, tokens, ctx.positions_BT, self.chunk, self.bound, self.horizon)
        (y_BHTK,), after = self.walk(Known(tokens), memory, ctx, tokens.q.dtype)
        return y_BHTK, after

    def walk(self, source: Source, memory: Memory | None, ctx: Context, wide: torch.dtype) -> tuple[Found, Memory]:
        """What is found for all tokens, y (B, H, T, K) and what ``source`` adds; and the memory after them."""
        first = tuple(weight.to(wide) for weight in self.first)
        if memory is None and not ctx.packed:
            return self._one_document(first, source, ctx)
        return self._documents(first, source, memory, ctx)

    def _one_document(self, first: Weights, source: Source, ctx: Context) -> tuple[Found, Memory]:
        """Every row is one document from its first token on: chunk after chunk."""
        none = tuple(torch.zeros_like(weight) for weight in first) if self.momentum else ()
        memory, found = Memory(first, first, none), []
        batch, count = ctx.positions_BT.shape
        for number, place in enumerate(range(0, count, self.chunk)):
            size = min(self.chunk, count - place)
            real_BW = torch.ones(batch, size, dtype=torch.bool, device=ctx.positions_BT.device)
            tokens, more = source.window(memory, Slice(place, size), real_BW, number)
            y, memory = self._advance(memory, tokens, ctx)
            found.append((y, *more))
            if size == self.chunk:
                memory = self._cut(replace(memory, base=memory.now), (number + 1) % max(self.horizon, 1) == 0)
        return _joined(found), memory.map(lambda w: w if w.dim() == 4 else w.expand(batch, *w.shape))

    def _documents(self, first: Weights, source: Source, given: Memory | None, ctx: Context) -> tuple[Found, Memory]:
        """Rows of documents, each wherever it is: fresh tokens, then version after version."""
        at = Layout.of(ctx.positions_BT, self.chunk, given is None)
        tokens, more = source.fresh(first, at)
        fresh_BHTK, heard, deltas = self._fresh(first, tokens, at)
        fresh_found = (fresh_BHTK, *more)
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
                window, more = source.window(memory, Gather(index_BW, real_BW), real_BW, number)
                y, memory = self._advance(memory, window, ctx)
                found.append((y, *more))
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
            return fresh_found, memory
        slot_BT, fresh_BT = at.slots(given is None)
        some = (
            torch.where(fresh_BT[:, None, :, None], new, old.gather(2, slot_BT[:, None, :, None].expand_as(new)))
            for new, old in zip(fresh_found, _joined(found), strict=True)
        )
        return tuple(some), memory

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

        def both(x: Tensor) -> Tensor:
            return blocks(x, 2, size, size)

        rows = tokens.map(both, blocks(tokens.real.long(), 1, size, size).bool())
        document_BN = blocks(at.start_BT + 1, 1, size, size)  # 0 is the document of the padding
        within, learned = decays(rows, document_BN, size), Memory(first, first, ())
        y = read(learned, rows.q[:, :, size:], [both(a) for a in heard], [both(d) for d in deltas], within)
        return unblocked(y, count), heard, deltas

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
        window = Known(tokens).window(learned, Gather(index_BW, real_BW), real_BW, 0)[0]
        within = decays(window, torch.zeros_like(index_BW), 1)
        heard, deltas = ([Gather(index_BW, real_BW)(each) for each in some] for some in (heard, deltas))
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
        weights, copies = sum(weight.numel() for weight in self.first), 2 if self.momentum else 1
        carried = (len(self.conv.weight) - 1) * self.sizes[0] * self.itemsize()
        carried += (1 + copies) * weights * max(4, self.itemsize())
        return Cost(self.own_params(), 2 * matrices + self.scan_flops(context) / context, carried)

    def scan_flops(self, context: int) -> float:
        """Of the memory alone, for a whole document."""
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
        return scan


Found = tuple[Tensor, ...]
"""What is found for every token, each (B, H, T, F)."""


class Source(Protocol):
    """Where the memory's tokens come from: they are known, or hang on what the memory says."""

    def fresh(self, first: Weights, at: Layout) -> tuple[Tokens, Found]:
        """All tokens as if they were fresh; and what else is to be found for them."""

    def window(self, memory: Memory, pick: Pick, real_BW: Tensor, number: int) -> tuple[Tokens, Found]:
        """Those of a window, which continues ``memory``, version ``number`` of a row (chunk of the only document)."""


@dataclass(frozen=True)
class Known:
    """Tokens that do not hang on the memory."""

    tokens: Tokens

    def fresh(self, first: Weights, at: Layout) -> tuple[Tokens, Found]:
        return self.tokens, ()

    def window(self, memory: Memory, pick: Pick, real_BW: Tensor, number: int) -> tuple[Tokens, Found]:
        return self.tokens.map(pick, real_BW), ()


def _joined(found: list[Found]) -> Found:
    return tuple(torch.cat(parts, dim=2) for parts in zip(*found, strict=True))


def _where(rows_B: Tensor, yes: Weights, no: Weights) -> Weights:
    return tuple(torch.where(rows_B[:, None, None, None], a, b) for a, b in zip(yes, no, strict=True))


def _choose(rows_B: Tensor, yes: Memory, no: Memory) -> Memory:
    """Row by row, one memory or the other."""
    pairs = ((yes.base, no.base), (yes.now, no.now), (yes.momentum, no.momentum))
    return Memory(*(_where(rows_B, *pair) for pair in pairs))
