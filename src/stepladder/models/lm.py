"""The language model: embed -> prelude -> core -> coda -> norm -> head. One forward for everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.core.registry import did_you_mean
from stepladder.models.base import Context, Cost, Edit, Images, Output, Part, Sink, State
from stepladder.models.encoders.base import Encoder
from stepladder.models.heads.base import Head
from stepladder.models.heads.softmax import SoftmaxHead
from stepladder.models.layers import Embedding, norm
from stepladder.models.noise import row_keys
from stepladder.models.stack import Stack


@dataclass(frozen=True)
class ModelState:
    """Everything that goes from one call to the next, batch first.

    position_B: position the next token of the current document has. document_B: that document's id, -1 at start.
    key_B: the row's random key. prelude, core, coda, head: the states of the parts; most heads have none.
    """

    position_B: Tensor
    document_B: Tensor
    key_B: Tensor
    prelude: State
    core: State
    coda: State
    head: State = None


class LanguageModel(nn.Module):
    """A causal language model assembled from parts; what an architecture's ``build`` returns.

    core is usually a recurrence (once, loop, ...); prelude and coda are parts applied once before and after it.
    vision: the encoder of the images that may stand among the tokens, set by whoever builds the model; or None.
    final_norm False: the last part's output is for the head as it is.
    head: a softmax unless another is given; ``tied`` is about the softmax.
    """

    vision: Encoder | None

    def __init__(
        self,
        vocab: int,
        width: int,
        core: Part,
        *,
        prelude: Part | None = None,
        coda: Part | None = None,
        tied: bool = False,
        learned_positions: int = 0,
        final_norm: bool = True,
        head: Head | None = None,
    ) -> None:
        super().__init__()
        self.vocab, self.width, self.vision = vocab, width, None
        self.embed = Embedding(vocab, width, learned_positions, tied)
        self.prelude = Stack([]) if prelude is None else prelude
        self.core = core
        self.coda = Stack([]) if coda is None else coda
        self.norm = norm(width) if final_norm else nn.Identity()
        self.head = SoftmaxHead(width, vocab, self.embed.tokens if tied else None) if head is None else head
        _number(self)

    def forward(
        self,
        tokens_BT: Tensor,
        state: ModelState | None = None,
        *,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        ticks: int | None = None,
        key: int | Tensor | None = None,
        logits_at: str | Tensor | None = None,
        trace: bool | Literal["ticks"] = False,
        recompute: bool = False,
        edits: Mapping[str, Edit] | None = None,
        images: Images | None = None,
        spend_state: bool = False,
    ) -> Output:
        """Run a chunk of tokens, from the start of a sequence (state None) or from where ``state`` left off.

        tokens_BT: int64 ids. targets: (B, T) next tokens, IGNORE where unscored: gives ``nll_BT`` and no logits.
        documents: (B, T) ids >= 0; a change of id starts a new document, nothing is seen across it. None = the
        document goes on. ticks: tick budget. key: seed of stochastic parts, an integer or one per row (B,); only
        at the start of a sequence, later calls carry it in the state. logits_at: None = all positions, "last", or
        a boolean mask (B, T). trace: collect diagnostics, or "ticks" alone. recompute: trade compute for activation
        memory. edits: interventions, functions by the name of the tap whose value they replace (see Context.edited).
        images: what stands at some positions in place of tokens, whose ids there have no embedding. spend_state: the
        caller will not use ``state`` again, so this call may write into it (with gradients it never does).
        """
        if tokens_BT.dim() != 2 or tokens_BT.shape[1] == 0:
            raise UserError(f"tokens have shape {tuple(tokens_BT.shape)}; give (batch, length >= 1) integer ids")
        if state is None:
            state = self._start(tokens_BT, key)
            packed = documents is not None
        else:
            if key is not None:
                raise UserError("the random key is part of the state; give key only at the start of a sequence")
            packed = True
        positions_BT, document_B = _positions(tokens_BT, state, documents)
        sink = Sink(trace={} if trace else None, full=trace != "ticks")
        seen = None if images is None else self._seen(images, tokens_BT)
        placed_BT = None if seen is None else seen[0]
        spend = spend_state and not torch.is_grad_enabled()
        ctx = Context(tokens_BT, positions_BT, packed, ticks, state.key_B, 0, recompute, sink, edits, spend, placed_BT)

        x_BTD = self.embed(ctx, seen)
        x_BTD, prelude = self.prelude(x_BTD, state.prelude, ctx)
        x_BTD, core = self.core(x_BTD, state.core, ctx)
        x_BTD, coda = self.coda(x_BTD, state.coda, ctx)
        logits, nll_BT, head = self.head(self.norm(x_BTD), state.head, ctx, targets, logits_at)
        for name in edits or ():
            if name not in sink.taps:
                known = ", ".join(sorted(sink.taps)) or "none"
                raise UserError(f"edits: nothing is called '{name}'{did_you_mean(name, sink.taps)}; taps: {known}")

        if targets is not None:
            self._lessons(targets, sink)
        sink.asked.clear()  # what is left of it holds this very sink: memory would wait for the garbage collector
        sink.open = False
        after = ModelState(positions_BT[:, -1] + 1, document_B, state.key_B, prelude, core, coda, head)
        return Output(logits, nll_BT, after, sink.losses, sink.trace or {})

    def _seen(self, images: Images, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        if self.vision is None:
            raise UserError("this model has no encoder for images; give the run one, such as encoder: {kind: conv}")
        if images.slots_BT.shape != tokens_BT.shape:
            raise ValueError(f"slots have shape {tuple(images.slots_BT.shape)}, tokens {tuple(tokens_BT.shape)}")
        return self.vision.place(images)

    def _lessons(self, targets_BT: Tensor, sink: Sink) -> None:
        """Score the states that parts asked for, see Context.when_scored."""
        for states, then, learn in sink.asked:
            with torch.set_grad_enabled(learn and torch.is_grad_enabled()):
                h_ND = self.norm(torch.cat(states))  # the states behind one another, as rows of one batch
                nll_NT = self.head.nll(h_ND, targets_BT.repeat(len(states), 1))
            then(nll_NT.unflatten(0, (len(states), -1)))

    def _start(self, tokens_BT: Tensor, key: int | Tensor | None) -> ModelState:
        batch, device = tokens_BT.shape[0], tokens_BT.device
        zero_B = torch.zeros(batch, dtype=torch.int64, device=device)
        return ModelState(zero_B, zero_B - 1, row_keys(0 if key is None else key, batch, device), None, None, None)

    def init_state(
        self,
        batch: int,
        capacity: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        ticks: int | None = None,
        key: int | Tensor | None = None,
    ) -> ModelState:
        """A start-of-sequence state with room for ``capacity`` tokens a row; longer input is refused, never wrapped."""
        weight = self.embed.tokens.weight
        device = weight.device if device is None else torch.device(device)
        dtype = weight.dtype if dtype is None else dtype
        prelude, core, coda = (
            part.init_state(batch, capacity, device, dtype, ticks) for part in (self.prelude, self.core, self.coda)
        )
        zero_B = torch.zeros(batch, dtype=torch.int64, device=device)
        keys_B = row_keys(0 if key is None else key, batch, device)
        head = self.head.init_state(batch, device, dtype)
        return ModelState(zero_B, zero_B - 1, keys_B, prelude, core, coda, head)

    def cost(self, context: int, ticks: int | None = None, images: float = 0.0) -> Cost:
        """Parameters, forward FLOPs per token and state bytes per sequence, at ``context`` tokens and ``ticks``.

        images: how many stand in a sequence, on average; their encoder's FLOPs are shared out to all its tokens.
        """
        outer = self.embed.cost() + Cost(sum(p.numel() for p in self.norm.parameters())) + self.head.cost()
        if self.vision is not None:
            seen = self.vision.cost()
            outer += Cost(seen.params, seen.flops * images / context)
        counters = Cost(state_bytes=3 * torch.int64.itemsize)
        parts = (part.cost(context, ticks) for part in (self.prelude, self.core, self.coda))
        return sum(parts, outer + counters)


def _number(model: nn.Module) -> None:
    """Count the parts that have a class attribute ``site``, each kind from 0: it names their taps, keys their noise."""
    count: Counter[type] = Counter()
    for part in model.modules():
        kind = next((each for each in reversed(type(part).__mro__) if "site" in vars(each)), None)
        if kind is not None:
            part.site = count[kind]  # type: ignore[assignment]
            count[kind] += 1


def _positions(tokens_BT: Tensor, state: ModelState, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions inside the documents (B, T), and the id of each row's last document (B,)."""
    index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    going_on_BT = state.position_B[:, None] + index_T
    if documents is None:
        return going_on_BT, state.document_B
    if documents.shape != tokens_BT.shape:
        raise UserError(
            f"documents have shape {tuple(documents.shape)}, tokens {tuple(tokens_BT.shape)}; make them equal"
        )
    before_BT = torch.cat((state.document_B[:, None], documents[:, :-1]), dim=1)
    start_BT = torch.where(documents != before_BT, index_T, -1).cummax(dim=1).values
    return torch.where(start_BT >= 0, index_T - start_BT, going_on_BT), documents[:, -1]
