"""VecTur in the place of attention: vector Turing machines that see the past of their own document only.

The machine is that of mixers.machine. Its original runs once over the whole sequence and gives the final tape back, so
every position hears the future. Four forms of it live here; three are causal:

prefix (canonical, exact)  One machine per position j, over the tokens 0..j of its document: N = j + 1 cells, cell i
    holds W_T x_i. All machines of a row start from the same tape and every write has rank one, so none of the tapes
    is ever formed (machine.RankOne): all positions run in parallel, and decoding runs the new position's machine.
chunk   The same machines, but only where a chunk of C tokens of the document ends; what the latest of them gives is
    given to every token until the next. 1/C of the work; a document's first C - 1 tokens get exactly 0.
stream  One machine a document, for ever: r ticks a token over a ring of N cells. Token p overwrites cell p mod N with
    W_T x_p. The tape is carried over as it is, the control as past_{j+1}; heads start anew. O(1) state, sequential.
bidirectional  The machine of the last position, all of whose tape is given back: row i gets its cell i. This is the
    original's form, for encoders. It is not causal, so no language model is built from it.

A machine of token j starts from x_j and a vector past_j: the mean of x_0..x_j (prefix, chunk, bidirectional), or
past_{j+1} = (past_j + norm Q) / 2 with the control Q after token j, from 0 (stream). Q_0 and what places the heads are
linear in [x_j; past_j], kappa is softplus of a small network of Q_0. The output is W_o norm[ T[j]; S; Q ] of the
machine after its last tick: its own cell, what its heads read where they ended, its control.

With ``random`` every token brings a second cell of random symbols, a function of (key, part, position, lane). On the
circle the random cells lie in front of the newest token, which is behind the oldest one: N doubles.

Suffixes beside those of models.base: E machines of a row, M width of a cell, N cells of the ring, S cells of a cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.layers import NORM_EPS, linear, norm
from stepladder.models.mixers.attention import Cache, FixedCache, extend
from stepladder.models.mixers.machine import Explicit, Final, Machine, Places, RankOne, Start
from stepladder.models.noise import uniform

Form = Literal["prefix", "chunk", "stream", "bidirectional"]
Symbols = Literal["rademacher", "gaussian"]


@dataclass(frozen=True)
class Known:
    """What is carried along a sequence.

    tape: cells of the past, k: (B, S, 1, M); v: their random cells, (B, S, 1, draws x M), of width 0 without. total_BD:
    sum of the inputs of the document so far.
    """

    tape: Cache | FixedCache
    total_BD: Tensor


@dataclass(frozen=True)
class Told(Known):
    """Form chunk: and what the latest machine gave, 0 and 1 if there was none."""

    result_BD: Tensor
    ticks_B: Tensor


@dataclass(frozen=True)
class Running:
    """The machine of form stream between two tokens: its ring, random cells behind, and its control (see module)."""

    ring_BNM: Tensor
    control_BM: Tensor


class VecTur(Part):
    """A vector Turing machine as a mixer; see the module for its forms, zoo.vectur for the source and differences.

    inner: width M of a cell and of the control. expand: hidden widths as a multiple of it. ticks: the tick budget.
    halt: the gate at which a machine stops. reach, spread: how far a tick and the input move heads. chunk, cells: of
    forms chunk and stream. tape: how tapes are kept, an implementation. random: what random cells hold, or None;
    draws: random tapes over which the output is averaged in eval mode. gain: scale of the initial output map.
    """

    site = 0

    def __init__(
        self,
        width: int,
        inner: int,
        heads: int,
        expand: int,
        ticks: int,
        halt: float,
        reach: float,
        spread: float,
        *,
        form: Form,
        chunk: int,
        cells: int,
        tape: Literal["rank_one", "explicit"],
        random: Symbols | None,
        draws: int,
        gain: float,
    ) -> None:
        super().__init__()
        if form == "stream" and draws > 1:
            raise UserError("form: stream keeps one tape for ever, so there is nothing to average; take draws: 1")
        self.inner, self.heads, self.ticks, self.form, self.chunk, self.cells = inner, heads, ticks, form, chunk, cells
        self.tape, self.random, self.draws = tape, random, draws
        self.write = linear(width, inner)
        self.machine = Machine(
            width, inner if form == "stream" else width, inner, heads, expand, ticks, halt, reach, spread
        )
        if random is not None and heads > 1:
            with torch.no_grad():
                self.machine.behind[-1] = -1.0  # in front of the own cell: among the random ones
        self.norm, self.out = norm(3 * inner), linear(3 * inner, width, gain)

    @property
    def name(self) -> str:
        """How taps and traces of this part are called."""
        return f"{'vectur' if self.random is None else 'vecstur'}{self.site}"

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        ticks = self.ticks if ctx.ticks is None else ctx.ticks
        if ticks < 1:
            raise UserError(f"ticks={ticks}: a machine takes at least one; give ticks >= 1")
        if self.form == "stream":
            return self._stream(x_BTD, state, ctx, ticks)
        total_BTD = document_sums(x_BTD, None if state is None else state.total_BD, ctx.positions_BT)
        cells, symbols = self._cells(x_BTD, ctx)
        past, tape = extend(None if state is None else state.tape, cells[:, :, None], symbols[:, :, None])
        here_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        here_BT = (here_T if past is None else past[:, None] + here_T).expand(ctx.positions_BT.shape)
        known = Known(tape, total_BTD[:, -1])
        if self.form == "bidirectional":
            return self._whole(x_BTD, total_BTD, known, ctx, ticks)
        if self.form == "chunk":
            return self._chunks(x_BTD, total_BTD, here_BT, state, known, ctx, ticks)
        y_BTD, ticks_BT, notes = self._results(x_BTD, total_BTD, here_BT, tape, ctx, ticks)
        return self._reported(y_BTD, ticks_BT, notes, ctx), known

    def _cells(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """What the tokens write on the tape, (B, T, M), and their random cells, (B, T, draws x M), float32 or wider."""
        cells_BTM = self.write(x_BTD)
        cells_BTM = cells_BTM.to(torch.promote_types(cells_BTM.dtype, torch.float32))
        lanes = self._random_width
        if not lanes:
            return cells_BTM, cells_BTM[..., :0]
        u_BTR = uniform(ctx, -1 - self.site, lanes).to(cells_BTM.dtype)  # dropout has the sites from 0 on
        if self.random == "rademacher":
            return cells_BTM, torch.where(u_BTR < 0.5, -1.0, 1.0).to(cells_BTM.dtype)
        return cells_BTM, math.sqrt(2) * torch.erfinv(2 * u_BTR + (2.0**-24 - 1))  # the middles of 2^24 intervals

    @property
    def _random_width(self) -> int:
        return 0 if self.random is None else self.draws * self.inner

    # -------------------------------------------------------------------------------------------- prefix

    def _results(
        self, x_BED: Tensor, total_BED: Tensor, here_BE: Tensor, tape: Cache | FixedCache, ctx: Context, ticks: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the machines of tokens x give, (B, E, D), their ticks and notes. ``ctx`` has their positions.

        total: sums of the inputs of the document up to each of them. here: their places in the cache.
        """
        position_BE, size = ctx.positions_BT, tape.k_BSGK.shape[1]
        at = Places(position_BE, position_BE + 1, here_BE - position_BE, None if self.random is None else size)
        start = self.machine.start(x_BED, total_BED / (position_BE[..., None] + 1), at)
        draws = self.draws if self.random is not None and not self.training else 1
        finals: list[Final] = []
        for symbols in tape.v_BSGK[:, :, 0].split(self.inner, dim=-1)[:draws] if self.random else (None,):
            cells = tape.k_BSGK[:, :, 0]
            cells = cells if symbols is None else torch.cat((cells, symbols), dim=1)
            quiet = replace(ctx, sink=replace(ctx.sink, open=False)) if finals else ctx  # the first draw is traced
            finals.append(self._run(cells, start, at, ticks, quiet))
        y_BED = self.out(torch.stack([self._outcome(final) for final in finals]).mean(0))
        ticks_BE = torch.stack([final.ticks_BE for final in finals]).amax(0)
        return y_BED, ticks_BE, finals[0].notes

    def _run(self, cells_BSM: Tensor, start: Start, at: Places, ticks: int, ctx: Context) -> Final:
        """All machines at once over the tape they share, or one after the other over tapes of their own."""
        if self.tape == "rank_one" or not ctx.positions_BT.shape[1]:
            return self.machine(RankOne(cells_BSM), start, at, ticks, ctx, self.name)
        finals = [
            self.machine(Explicit(cells_BSM), start.only(e), at.only(e), ticks, _only(ctx, e), self.name)
            for e in range(ctx.positions_BT.shape[1])
        ]
        return _joined(finals)

    def _outcome(self, final: Final) -> Tensor:
        """norm[ T[j]; S; Q ]."""
        joined = torch.cat((final.own_BEM, final.read_BEM, final.control_BEM), dim=-1)
        return self.norm(joined.to(self.norm.weight.dtype))

    def _reported(self, y_BTD: Tensor, ticks_BT: Tensor, notes_BT: dict[str, Tensor], ctx: Context) -> Tensor:
        """The output, after telling what is to be told of it."""
        ctx.note_ticks(ticks_BT)
        if ctx.tracing:
            for name, value in {"ticks": ticks_BT, **notes_BT}.items():
                ctx.note(f"{self.name}.{name}", value)
        return y_BTD

    # -------------------------------------------------------------------------------------------- chunk

    def _chunks(
        self, x_BTD: Tensor, total_BTD: Tensor, here_BT: Tensor, before: State, known: Known, ctx: Context, ticks: int
    ) -> tuple[Tensor, State]:
        """Machines where (p + 1) % chunk = 0, slot after slot of a row; every token gets what the latest one gave."""
        batch, tokens, width = x_BTD.shape
        ends_BT = (ctx.positions_BT + 1) % self.chunk == 0
        latest_BT = ends_BT.cumsum(1)
        slots = tokens // self.chunk if before is None else -(-tokens // self.chunk)  # as many as there can be
        number_BE = torch.arange(1, slots + 1, device=x_BTD.device).repeat(batch, 1)
        # A slot that is left over runs at the last token: it has something to see, and nobody gets its result.
        index_BE = torch.searchsorted(latest_BT, number_BE).clamp(max=tokens - 1)
        at = replace(
            ctx, positions_BT=ctx.positions_BT.gather(1, index_BE), tokens_BT=ctx.tokens_BT.gather(1, index_BE)
        )
        x_BED, total_BED = (_taken(each, index_BE) for each in (x_BTD, total_BTD))
        y_BED, ticks_BE, notes = self._results(x_BED, total_BED, here_BT.gather(1, index_BE), known.tape, at, ticks)

        none = Told(known.tape, known.total_BD, y_BED.new_zeros(batch, width), ticks_BE.new_ones(batch))
        old: Told = none if before is None else before
        results_BRD = torch.cat((old.result_BD[:, None], y_BED), 1)
        ticks_BR = torch.cat((old.ticks_B[:, None], ticks_BE), 1)
        some_BT = ctx.positions_BT + 1 >= self.chunk  # whether there is a result to get
        y_BTD = torch.where(some_BT[..., None], _taken(results_BRD, latest_BT), 0.0)
        ticks_BT = torch.where(some_BT, ticks_BR.gather(1, latest_BT), 1)
        if slots:
            at_BT = (latest_BT - 1).clamp(min=0)
            notes = {name: _filled(_taken(each, at_BT), ends_BT) for name, each in notes.items()}
        last_B1 = latest_BT[:, -1:]
        after = replace(none, result_BD=_taken(results_BRD, last_B1)[:, 0], ticks_B=ticks_BR.gather(1, last_B1)[:, 0])
        return self._reported(y_BTD, ticks_BT, notes if slots else {}, ctx), after

    # -------------------------------------------------------------------------------------------- bidirectional

    def _whole(self, x_BTD: Tensor, total_BTD: Tensor, known: Known, ctx: Context, ticks: int) -> tuple[Tensor, State]:
        """The last position's machine, run over an explicit tape that is all given back."""
        if ctx.packed:
            raise UserError("a bidirectional machine reads one whole sequence a row: no documents, no carried state")
        tokens, last = x_BTD.shape[1], x_BTD.shape[1] - 1
        position_B1 = ctx.positions_BT[:, -1:]
        at = Places(position_B1, position_B1 + 1, position_B1 * 0, None if self.random is None else tokens)
        start = self.machine.start(x_BTD[:, -1:], total_BTD[:, -1:] / tokens, at)
        symbols = known.tape.v_BSGK[:, :, 0, : self.inner]
        tape = Explicit(
            torch.cat((known.tape.k_BSGK[:, :, 0], symbols), dim=1) if self.random else known.tape.k_BSGK[:, :, 0]
        )
        final = self.machine(tape, start, at, ticks, _only(ctx, last), self.name)
        shared = (each.expand(-1, tokens, -1) for each in (final.read_BEM, final.control_BEM))
        joined = torch.cat((tape.cells_BSM[:, :tokens], *shared), dim=-1)
        notes = {name: each.expand(-1, tokens, *each.shape[2:]) for name, each in final.notes.items()}
        y_BTD = self.out(self.norm(joined.to(self.norm.weight.dtype)))
        return self._reported(y_BTD, final.ticks_BE.expand(-1, tokens), notes, ctx), None

    # -------------------------------------------------------------------------------------------- stream

    def _stream(self, x_BTD: Tensor, state: State, ctx: Context, ticks: int) -> tuple[Tensor, State]:
        """Token after token: overwrite a cell of the ring, run ``ticks`` ticks, go on."""
        cells_BTM, symbols_BTM = self._cells(x_BTD, ctx)
        running = self._still(len(x_BTD), x_BTD.device, cells_BTM.dtype) if state is None else state
        finals, outcomes = [], []
        for token in range(x_BTD.shape[1]):
            now = _only(ctx, token)
            new = now.positions_BT == 0
            # A fill, not a product: whatever a finished document left behind, be it infinite, is gone.
            ring, control = running.ring_BNM.masked_fill(new[..., None], 0.0), running.control_BM.masked_fill(new, 0.0)
            at = self._ring(now.positions_BT)
            slot = at.own_BE[..., None].expand(-1, -1, self.inner)
            ring = ring.scatter(1, slot, cells_BTM[:, token, None])
            if self.random is not None:
                ring = ring.scatter(1, slot + self.cells, symbols_BTM[:, token, None])
            tape = Explicit(ring)
            start = self.machine.start(x_BTD[:, token, None], control[:, None], at)
            final = self.machine(tape, start, at, ticks, now, self.name)
            # A mean that fades: heads or a control carried over as they are would add rounding up to chaos.
            ended = F.rms_norm(final.control_BEM[:, 0], (self.inner,), eps=NORM_EPS)
            running = Running(tape.cells_BSM, (control + ended) / 2)
            finals.append(final)
            outcomes.append(self._outcome(final))
        whole = _joined(finals)
        return self._reported(self.out(torch.cat(outcomes, 1)), whole.ticks_BE, whole.notes, ctx), running

    def _ring(self, position_B1: Tensor) -> Places:
        """Where the machine of a token stands on the ring."""
        cells = torch.full_like(position_B1, self.cells)
        return Places(position_B1 % self.cells, cells, cells * 0, None if self.random is None else self.cells)

    def _still(self, batch: int, device: torch.device, dtype: torch.dtype) -> Running:
        """Nothing on the tape; the first token resets the rest."""
        cells = self.cells if self.random is None else 2 * self.cells
        shapes = (cells, self.inner), (self.inner,)
        return Running(*(torch.zeros(batch, *shape, device=device, dtype=dtype) for shape in shapes))

    # -------------------------------------------------------------------------------------------- state and cost

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        if self.form == "stream":
            return self._still(batch, device, wide)
        none = torch.zeros(batch, device=device, dtype=torch.int64)
        k, v = (
            torch.zeros(batch, capacity, 1, size, device=device, dtype=wide)
            for size in (self.inner, self._random_width)
        )
        total = torch.zeros(batch, self.out.out_features, device=device, dtype=wide)
        known = Known(FixedCache(k, v, none), total)
        if self.form == "prefix":
            return known
        return Told(known.tape, total, torch.zeros_like(total, dtype=dtype), none + 1)

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """Every machine executes ``ticks``, as they do with gradients; of as many draws as the part's mode has."""
        budget, size = self.ticks if ticks is None else ticks, max(4, self.itemsize())
        draws = self.draws if self.random is not None and not self.training else 1
        start = self.machine.flops(0)
        machine = start + draws * (self.machine.flops(budget) - start) + 2 * self.out.weight.numel()
        width, random = self.out.out_features, self._random_width
        machines, carried = float(context), context * (self.inner + random) * size + width * size
        if self.form == "chunk":
            machines = context // self.chunk
            carried += width * self.itemsize() + torch.int64.itemsize
        elif self.form == "stream":
            carried = (self.cells * (self.inner + random) + self.inner) * size
        flops = 2 * self.write.weight.numel() + machines * machine / context
        return Cost(self.own_params(), flops, carried)


def document_sums(x_BTD: Tensor, before_BD: Tensor | None, positions_BT: Tensor) -> Tensor:
    """Sums of x over the tokens of the document up to each, float32 or wider; ``before`` of what earlier calls had.

    In log T doublings (Hillis & Steele, 1986): after n of them a sum has the last 2^n tokens, never one of another
    document.
    """
    total = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
    shift, tokens = 1, x_BTD.shape[1]
    while shift < tokens:
        earlier = F.pad(total[:, :-shift], (0, 0, shift, 0))
        total = total + torch.where((positions_BT >= shift)[..., None], earlier, 0.0)
        shift *= 2
    if before_BD is None:
        return total
    goes_on_BT = positions_BT > torch.arange(tokens, device=x_BTD.device)
    return total + torch.where(goes_on_BT[..., None], before_BD[:, None], 0.0)


def _only(ctx: Context, place: int) -> Context:
    """The context of one token, or of one machine."""
    one = slice(place, place + 1)
    return replace(ctx, positions_BT=ctx.positions_BT[:, one], tokens_BT=ctx.tokens_BT[:, one])


def _joined(finals: list[Final]) -> Final:
    """Machines that ran one by one, side by side."""
    own, read, control, ticks = (
        torch.cat([getattr(final, side) for final in finals], 1)
        for side in ("own_BEM", "read_BEM", "control_BEM", "ticks_BE")
    )
    notes = {name: torch.cat([final.notes[name] for final in finals], 1) for name in finals[0].notes}
    return Final(own, read, control, ticks, notes)


def _taken(x: Tensor, index_BN: Tensor) -> Tensor:
    """x (B, R, ...) at the places ``index_BN`` of its second axis, (B, N, ...)."""
    return x.gather(1, index_BN.view(*index_BN.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def _filled(x: Tensor, where_BT: Tensor) -> Tensor:
    """0 where there was no machine."""
    return torch.where(where_BT.view(*where_BT.shape, *(1,) * (x.dim() - 2)), x, 0)
