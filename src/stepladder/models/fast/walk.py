"""The walk over a call's chunks, for any inner learner whose memory changes at fixed places of a document.

Rows stand at different places of their documents: fast.chunks says which tokens are computed together.

Suffixes: B batch, T tokens, H heads, K head width, W tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepladder.models.base import Context
from stepladder.models.fast.chunks import Gather, Layout, Pick, Slice
from stepladder.models.fast.fast_weights import Memory, Tokens, Weights
from stepladder.models.layers import no_autocast

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


@dataclass(frozen=True)
class Watched:
    """A source, and of every token what ``look`` sees in the weights in force: F numbers, found last, (B, 1, T, F)."""

    source: Source
    look: Callable[[Weights], Tensor]

    def fresh(self, first: Weights, at: Layout) -> tuple[Tokens, Found]:
        tokens, more = self.source.fresh(first, at)
        return tokens, (*more, self._seen(first, tokens))

    def window(self, memory: Memory, pick: Pick, real_BW: Tensor, number: int) -> tuple[Tokens, Found]:
        tokens, more = self.source.window(memory, pick, real_BW, number)
        return tokens, (*more, self._seen(memory.base, tokens))

    def _seen(self, weights: Weights, tokens: Tokens) -> Tensor:
        seen = self.look(weights)
        batch, _, count, _ = tokens.q.shape
        return seen.reshape(-1, 1, 1, seen.shape[-1]).expand(batch, 1, count, -1)


def _joined(found: list[Found]) -> Found:
    return tuple(torch.cat(parts, dim=2) for parts in zip(*found, strict=True))


def _where(rows_B: Tensor, yes: Weights, no: Weights) -> Weights:
    return tuple(torch.where(rows_B[:, None, None, None], a, b) for a, b in zip(yes, no, strict=True))


def choose(rows_B: Tensor, yes: Memory, no: Memory) -> Memory:
    """Row by row, one memory or the other."""
    pairs = ((yes.base, no.base), (yes.now, no.now), (yes.momentum, no.momentum))
    return Memory(*(_where(rows_B, *pair) for pair in pairs))


Rows = tuple[list[Tensor], list[Tensor]]
"""Of every layer what tokens heard and their errors: the gradient is the sum of products of the two."""


class Walker(nn.Module):
    """An inner learner. What it learns is taken at ``base``, the memory at the start of a chunk of ``chunk`` tokens.

    horizon: chunks of a document after which gradients stop, 0 = never. first: the weights at a document's start.
    """

    chunk: int
    horizon: int
    first: nn.ParameterList

    def learned(self, wide: torch.dtype) -> Memory:
        """The memory at a document's start, shared by all rows: (H, O, I)."""
        raise NotImplementedError

    def rows(self, base: Weights, tokens: Tokens) -> Rows:
        """The gradients of tokens at ``base``."""
        raise NotImplementedError

    def step(self, memory: Memory, tokens: Tokens, rows: Rows) -> tuple[Tensor, Memory]:
        """y (B, H, W, K) of tokens of one chunk that continue ``memory``, and the memory after them."""
        raise NotImplementedError

    def fresh(self, learned: Memory, tokens: Tokens, rows: Rows, at: Layout) -> Tensor:
        """y of all tokens as if they were fresh (others: anything finite)."""
        raise NotImplementedError

    def written(self, learned: Memory, tokens: Tokens, rows: Rows) -> Memory:
        """The memory after fresh tokens of one document; ``base`` stays."""
        raise NotImplementedError

    def commit(self, memory: Memory, done: int | Tensor) -> Memory:
        """The memory at the next chunk's start; ``done``: complete chunks of the document, (B,) or one for all."""
        return self.stopped(replace(memory, base=memory.now), done)

    def stopped(self, memory: Memory, done: int | Tensor) -> Memory:
        """The memory, detached where a horizon ends."""
        if self.horizon == 0:
            return memory
        stops, detached = done % self.horizon == 0, memory.map(Tensor.detach)
        if isinstance(stops, Tensor):
            return choose(stops, detached, memory)
        return detached if stops else memory

    def start(self, batch: int, device: torch.device, dtype: torch.dtype) -> Memory:
        """Zeros: what stands for the memory until a document's first token brings the learned one."""
        wide = torch.promote_types(dtype, torch.float32)
        return self.learned(wide).map(lambda w: torch.zeros(batch, *w.shape, device=device, dtype=wide))

    def look(self, weights: Weights) -> Tensor:
        """What a trace shows of weights (H, O, I) or (B, H, O, I): the norm of every head's, (H,) or (B, H)."""
        return torch.stack([weight.square().sum((-2, -1)) for weight in weights]).sum(0).sqrt()

    def walk(
        self, source: Source, memory: Memory | None, ctx: Context, wide: torch.dtype, name: str
    ) -> tuple[Found, Memory]:
        """What is found for all tokens, y (B, H, T, K) and what ``source`` adds; and the memory after them.

        name: that of the trace (B, T, ...) of what the memory looked like where a token's chunk began.
        """
        if ctx.tracing:
            source = Watched(source, self.look)
        if memory is None and not ctx.packed:
            found, memory = self._one_document(source, ctx, wide)
        else:
            found, memory = self._documents(source, memory, ctx, wide)
        if ctx.tracing:
            ctx.note(name, found[-1][:, 0])
            found = found[:-1]
        return found, memory

    def _one_document(self, source: Source, ctx: Context, wide: torch.dtype) -> tuple[Found, Memory]:
        """Every row is one document from its first token on: chunk after chunk."""
        memory, found = self.learned(wide), []
        batch, count = ctx.positions_BT.shape
        for number, place in enumerate(range(0, count, self.chunk)):
            size = min(self.chunk, count - place)
            real_BW = torch.ones(batch, size, dtype=torch.bool, device=ctx.positions_BT.device)
            tokens, more = source.window(memory, Slice(place, size), real_BW, number)
            y, memory = self._advance(memory, tokens, ctx)
            found.append((y, *more))
            if size == self.chunk:
                memory = self.commit(memory, number + 1)
        return _joined(found), memory.map(lambda w: w if w.dim() == 4 else w.expand(batch, *w.shape))

    def _documents(self, source: Source, given: Memory | None, ctx: Context, wide: torch.dtype) -> tuple[Found, Memory]:
        """Rows of documents, each wherever it is: fresh tokens, then version after version."""
        at, learned = Layout.of(ctx.positions_BT, self.chunk, given is None), self.learned(wide)
        tokens, more = source.fresh(learned.base, at)
        with no_autocast(tokens.q.device):
            rows = self.rows(learned.base, tokens)
            fresh = (self.fresh(learned, tokens, rows, at), *more)
        if given is None:
            memory = self.start(len(ctx.positions_BT), tokens.q.device, wide)
        else:  # what a finished document left behind, be it infinite, is gone
            gone = (ctx.positions_BT[:, 0] == 0)[:, None, None, None]
            memory = given.map(lambda w: w.masked_fill(gone, 0.0))

        def written(index_BW: Tensor, real_BW: Tensor) -> Memory:
            """The learned memory after some fresh tokens, in every row."""
            pick = Gather(index_BW, real_BW)
            heard, deltas = ([pick(each) for each in some] for some in rows)
            with no_autocast(tokens.q.device):
                after = self.written(learned, tokens.map(pick, real_BW), (heard, deltas))
            return after.map(lambda w: w if w.dim() == 4 else w.expand(len(real_BW), *w.shape))

        found = []
        for number in range(at.events + 1):
            if number or given is not None:
                index_BW, real_BW = at.version(number)
                window, more = source.window(memory, Gather(index_BW, real_BW), real_BW, number)
                y, memory = self._advance(memory, window, ctx)
                found.append((y, *more))
            if number == at.events:
                break
            some_B, opening_B, done_B = at.event(number)
            after = memory
            # A chunk that begins in this call may end in it if the call is long enough, and where a document begins.
            if at.size == self.chunk:
                after = choose(opening_B, written(*at.until(at.when_BE[:, number], opening_B)), memory)
            memory = choose(some_B, self.commit(after, done_B), memory)
        open_B, index_BW, real_BW = at.ending()
        memory = choose(open_B, written(index_BW, real_BW), memory)
        if not found:
            return fresh, memory
        slot_BT, fresh_BT = at.slots(given is None)
        some = (
            torch.where(fresh_BT[:, None, :, None], new, old.gather(2, slot_BT[:, None, :, None].expand_as(new)))
            for new, old in zip(fresh, _joined(found), strict=True)
        )
        return tuple(some), memory

    def _advance(self, memory: Memory, window: Tokens, ctx: Context) -> tuple[Tensor, Memory]:
        """Read and write the tokens of a window, all of one chunk; recomputed in the backward pass if so asked."""

        def step(memory: Memory, window: Tokens) -> tuple[Tensor, Memory]:
            with no_autocast(window.q.device):  # memories are float32 whatever other products are made in
                return self.step(memory, window, self.rows(memory.base, window))

        if ctx.recompute and torch.is_grad_enabled():
            return checkpoint(step, memory, window, use_reentrant=False, preserve_rng_state=False)
        return step(memory, window)
