"""The contract every model part keeps: Part, Context, Output, Cost, and what a state may be.

Shape suffixes used in this package: B batch, T tokens of this call, S positions in a cache, D model width,
H heads, G key/value heads, K head width, F hidden width of a channel mixer, V vocabulary, N flattened tokens.

One call: prefill, decoding (a chunk of one token), streaming and truncated backpropagation are the same forward.
*Whole = any split into chunks with carried state* is the definition of correct.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stepladder.core.errors import UserError

IGNORE = -100
"""Target id of a position that is not scored."""

State = Any
"""A tree (tuples, dicts, dataclasses) of tensors, batch first, or None for the start of a sequence."""


def map_state(function: Callable[..., Any], state: State, *others: State) -> State:
    """Apply ``function`` to the tensors of one or several states of equal shape, keeping the tree."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return function(state, *others)
    if isinstance(state, tuple | list):
        return type(state)(map_state(function, *parts) for parts in zip(state, *others, strict=True))
    if isinstance(state, dict):
        return {name: map_state(function, state[name], *(other[name] for other in others)) for name in state}
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        names = [f.name for f in dataclasses.fields(state)]
        pick = {n: map_state(function, getattr(state, n), *(getattr(o, n) for o in others)) for n in names}
        return dataclasses.replace(state, **pick)
    raise TypeError(f"a state holds tensors only, not {type(state).__name__}")


def leaves(state: State) -> list[Tensor]:
    """All tensors of a state, in the order of its tree."""
    found: list[Tensor] = []
    map_state(found.append, state)
    return found


def take_rows(state: State, rows: Tensor) -> State:
    """The state of the sequences ``rows``: states are batch first, so requests can be regrouped at will."""
    return map_state(lambda leaf: leaf.index_select(0, rows), state)


def detach_state(state: State) -> State:
    """The same state, cut from the graph: the horizon of truncated backpropagation through time."""
    return map_state(lambda leaf: leaf.detach(), state)


@dataclass(frozen=True)
class Images:
    """Images that stand at positions of a chunk, batch first.

    pixels_BICYX: uint8, I images a row, C channels, Y x X pixels; rows with fewer are filled up with anything.
    slots_BT: which of its row's embeddings stands at a position, image by image (number i of the k of image j is
    j x k + i), -1 where a token does. Of a chunk only the slots are cut: the pixels are given with each of its parts.
    """

    pixels_BICYX: Tensor
    slots_BT: Tensor

    def at(self, rows: slice, columns: slice) -> Images:
        """A part of the rows and positions."""
        return Images(self.pixels_BICYX[rows], self.slots_BT[rows, columns])


@dataclass(frozen=True)
class Cost:
    """What a part costs. ``flops`` are those of matrix products, forward, per token, averaged over a sequence.

    lessons: FLOPs per token that training alone executes, forward and backward: likelihoods of states that are not the
    output (see Context.when_scored).
    """

    params: int = 0
    flops: float = 0.0
    state_bytes: float = 0.0
    lessons: float = 0.0

    @property
    def train_flops(self) -> float:
        """FLOPs per token of a training step: three forwards, the backward pass being two, and the lessons."""
        return 3 * self.flops + self.lessons

    def __add__(self, other: Cost) -> Cost:
        ours, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Cost(*(a + b for a, b in zip(ours, theirs, strict=True)))

    def repeated(self, times: float) -> Cost:
        """The same weights applied ``times`` times, each with a state of its own."""
        return Cost(self.params, self.flops * times, self.state_bytes * times, self.lessons * times)


@dataclass
class Sink:
    """Where parts leave named terms during one forward. Closed afterwards, so recomputation leaves nothing.

    trace: None if nobody asked for one; ``full`` is False where the ticks, executed and expected, are all that is
    wanted. taps: names of the values that were offered for editing, collected only if the caller edits any. asked:
    states whose likelihood a part wants, see Context.when_scored.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    trace: dict[str, Tensor] | None = None
    full: bool = True
    taps: set[str] = field(default_factory=set)
    asked: list[tuple[list[Tensor], Callable[[Tensor], None], bool]] = field(default_factory=list)
    open: bool = True


@dataclass(frozen=True)
class Context:
    """What every part may see beside its input. Nothing else travels sideways.

    tokens_BT: input tokens (planner heads and test-time learners observe them).
    positions_BT: position inside the document, 0 at each document's first token. A part resets where it is 0.
    packed: whether a row may hold several documents in this call; if False and there is no state, positions are
        0..T-1 in every row and plain causal masks suffice.
    ticks: the tick budget asked for at the call, or None for the architecture's own.
    key_B: one random key a row; tick: which application of a shared core this is (keys noise, nothing else).
    recompute: whether blocks drop their activations and recompute them in the backward pass.
    edits: interventions by the name of the tap they are for (see ``edited``), or None.
    spend: whether nobody goes on from the state that was passed in, so that a preallocated cache may be written in
        place. Copying every cache for every token is otherwise a good part of what decoding costs.
    images_BT: where an image stands and the token means nothing, or None if there are no images.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    packed: bool
    ticks: int | None
    key_B: Tensor
    tick: int
    recompute: bool
    sink: Sink
    edits: Mapping[str, Edit] | None = None
    spend: bool = False
    images_BT: Tensor | None = None

    def at_tick(self, tick: int) -> Context:
        """This context as the ``tick``-th application of a shared core sees it."""
        return dataclasses.replace(self, tick=tick)

    def add_loss(self, name: str, value_BT: Tensor) -> None:
        """Add a differentiable per-token term; equal names sum. The train config weights it by name."""
        if self.sink.open:
            known = self.sink.losses.get(name)
            self.sink.losses[name] = value_BT if known is None else known + value_BT

    def when_scored(self, states: list[Tensor], then: Callable[[Tensor], None], *, learn: bool) -> None:
        """Ask for the likelihood that each of K ``states`` (B, T, D) would have as the core's output.

        After the forward, and only if targets were given, the model has its head score them and calls ``then`` with
        nll (K, B, T), of which nothing can come but losses: no target ever reaches a part. At most one chunk of logits
        exists at a time. learn: whether the likelihoods carry gradients.
        """
        if self.sink.open:
            self.sink.asked.append((states, then, learn))

    def note(self, name: str, value: Tensor) -> None:
        """Leave a diagnostic (detached, batch first), if somebody asked for a trace."""
        if self.sink.open and self.sink.trace is not None and (self.sink.full or name in ("ticks", "ponder")):
            self.sink.trace[name] = value.detach()

    def note_ticks(self, ticks_BT: Tensor) -> None:
        """Tell the ticks that a part executed for every token. Of several parts, "ticks" is the most."""
        known = (self.sink.trace or {}).get("ticks", ticks_BT)
        self.note("ticks", torch.maximum(known, ticks_BT))

    @property
    def tracing(self) -> bool:
        """Whether diagnostics would be kept: those that cost something are made only then."""
        return self.sink.open and self.sink.full and self.sink.trace is not None

    def edited(self, name: str, value: Tensor) -> Tensor:
        """A tap: ``value``, or what the caller's edit of that name makes of it.

        A part that repeats gives its taps its own name, as in ``vectur0.angle``. An edit gets the value and this
        context (positions, tokens and tick tell it where it is) and returns a tensor of the same shape; gradients
        pass through it. It must be a function: with ``recompute`` it is called twice.
        """
        if self.edits is None:
            return value
        self.sink.taps.add(name)
        if name not in self.edits:
            return value
        new = self.edits[name](value, self)
        if new.shape != value.shape:
            raise UserError(f"the edit of '{name}' returns shape {tuple(new.shape)}, not {tuple(value.shape)}")
        return new.to(value.dtype)


Edit = Callable[[Tensor, Context], Tensor]
"""An intervention: a tapped value, and where in the call it was computed, to the value to go on with."""


class Part(nn.Module):
    """A module under the contract. Run-time state never lives on ``self``; rows share nothing."""

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """Map x_BTD to an output of the same shape and the state after it. ``state`` None = start of sequence."""
        raise NotImplementedError

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        """A start-of-sequence state, preallocated for ``capacity`` tokens where that makes decoding static."""
        return None

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """Cost of this part on sequences of ``context`` tokens, at ``ticks`` or at its own tick budget."""
        raise NotImplementedError

    def own_params(self) -> int:
        """Parameters of this module and everything below it, each counted once."""
        return sum(p.numel() for p in self.parameters())

    def itemsize(self) -> int:
        """Bytes of one element of this part's parameters, and so of the state it carries."""
        return next((p.element_size() for p in self.parameters()), torch.get_default_dtype().itemsize)


@dataclass
class Output:
    """What a model returns.

    logits: (B, T, V), (B, 1, V) for ``logits_at="last"``, or (N, V) for a mask; None when targets were given.
    nll_BT: negative log-likelihood of the targets in nats, float32 or wider; 0 where the target is IGNORE.
    state: what to pass as ``state`` to go on. losses: differentiable terms (B, T) by name. trace: diagnostics.
    """

    logits: Tensor | None
    nll_BT: Tensor | None
    state: State
    losses: dict[str, Tensor]
    trace: dict[str, Tensor]

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("an Output has named fields: use .logits, .nll_BT, .state, .losses, .trace")
