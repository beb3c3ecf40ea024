"""The planner: a head whose likelihood is a mixture of experts under a belief that is filtered along the text.

Hidden states come from any executor. log p(y_t | x_<=t) = LSE_k(g_tk + log p_k(y_t | h_t)), where the gate g is made
from the belief after token x_t (heads.belief). A token's evidence is what the experts had said about it one token
earlier, so the head carries the last hidden state and its K normalisers: K logits are then all it takes.

Chunks are counted in documents: with chunk m, a boundary lies behind token p where (p + first) % m == 0. What is
computed for a document does not depend on what is packed before it, or on how the text was cut into calls.

Suffixes as in models.base, and: K plans, J ids that are looked up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.models.base import IGNORE, Context, Cost, State
from stepladder.models.heads import softmax
from stepladder.models.heads.base import Head, wanted
from stepladder.models.heads.belief import (
    Belief,
    Chain,
    Evidence,
    Sampling,
    gate,
    gumbel,
    lookahead,
    move,
    naive,
    scan,
    segment_sums,
)
from stepladder.models.heads.experts import Experts
from stepladder.models.heads.plan_losses import Heard, PlanLosses, boundary
from stepladder.models.layers import no_autocast
from stepladder.models.noise import uniform

SITE = -(2**20)
"""Where this head's random numbers are: far from those of all other parts."""


@dataclass(frozen=True)
class Plan:
    """How a planner plans: one definition for training, scoring and decoding. Fields as in zoo.apelr."""

    plans: int
    chunk: int
    first: int
    filtering: bool
    context: Literal["mean", "last", "none"]
    self_bias: float
    horizon: int
    feedback: float
    temperature: float
    commitment: Literal["soft", "hard"]
    commit_temperature: float
    leak: float
    control: Literal["filtered", "frozen", "uniform", "forced"]
    forced: int
    scan: Literal["parallel", "naive"]


@dataclass(frozen=True)
class Carried:
    """What a planner carries, (B, ...); None where its settings need none.

    now, chosen: the belief after the last token and at the start of its chunk. h, lse: the last hidden state and the
    normalisers of its experts. heard: sum of the context evidence of the chunk so far. losses: of the losses.
    """

    now_BK: Tensor
    chosen_BK: Tensor
    h_BD: Tensor | None
    lse_BK: Tensor | None
    heard_BK: Tensor | None
    losses: State


class PlannerHead(Head):
    """See the module. ``losses``: the terms beside the likelihood. Source and differences: zoo.apelr."""

    def __init__(self, width: int, experts: Experts, plan: Plan, losses: PlanLosses) -> None:
        super().__init__()
        count = plan.plans
        if plan.control == "forced" and not 0 <= plan.forced < count:
            raise UserError(f"forced={plan.forced}: there are plans 0 to {count - 1}; choose one of them")
        self.experts, self.plan, self.losses, self.width = experts, plan, losses, width
        # Vectors, also the transition: the optimizer's rule that vectors do not decay is what these need.
        self.prior = nn.Parameter(torch.zeros(count))
        self.moves = nn.Parameter((plan.self_bias * torch.eye(count)).flatten())
        self.context = nn.Linear(width, count) if plan.context != "none" else None
        if self.context is not None:
            nn.init.normal_(self.context.weight, std=1 / math.sqrt(width))
            nn.init.zeros_(self.context.bias)

    @property
    def filters(self) -> bool:
        """Whether there is a belief at all; else the gate is fixed, as controls want it."""
        return self.plan.control == "filtered"

    def chain(self) -> Chain:
        """Prior and transition, float32 or wider."""
        prior, moves = (_wide(each) for each in (self.prior, self.moves))
        return Chain(prior.log_softmax(0), moves.unflatten(0, (len(prior), -1)).log_softmax(1))

    def forward(
        self, h_BTD: Tensor, state: State, ctx: Context, targets_BT: Tensor | None, where: str | Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, State]:
        if not self.filters:
            state = None
        start = self._start(len(h_BTD), h_BTD.device, h_BTD.dtype) if state is None else state
        with no_autocast(h_BTD.device):
            told = self._told(h_BTD, start, ctx)
            # At the start of a sequence there is nothing yet that could have been expected of its first token.
            first_BK = torch.zeros_like(start.now_BK) if state is None else self._surprise(start, ctx)
        ids_BTJ = torch.cat((_next(ctx.tokens_BT)[..., None], self.losses.ids(start.losses, ctx)), -1)
        logits = nll_BT = None
        if targets_BT is None:
            logits, heard = self._logits(h_BTD, ids_BTJ, told, first_BK, start, where)
        else:
            nll_BT, heard = self._nll(h_BTD, ids_BTJ, told, first_BK, start, targets_BT)
        if self.filters and ctx.tracing:
            ctx.note("belief", heard.belief.now.exp())
            ctx.note("plan", heard.belief.chosen.exp())
            ctx.note("gate", heard.gate_BTK.exp())
            ctx.note("forecast", move(heard.belief.now, self.chain().moves_KK).exp())
        if not self.filters:
            return logits, nll_BT, None
        with no_autocast(h_BTD.device):
            kept = self.losses(heard, self.experts, start.losses, ctx, scored=targets_BT is not None)
        now_BK, chosen_BK = heard.belief.last()
        sums_BK = None if told.sums_BTK is None else told.sums_BTK[:, -1]
        h_BD, lse_BK = (h_BTD[:, -1].clone(), heard.lse_BTK[:, -1].clone()) if self.plan.filtering else (None, None)
        return logits, nll_BT, Carried(now_BK, chosen_BK, h_BD, lse_BK, sums_BK, kept)

    def _nll(
        self, h_BTD: Tensor, ids_BTJ: Tensor, told: Told, first_BK: Tensor, start: Carried, targets_BT: Tensor
    ) -> tuple[Tensor, Heard]:
        """From K numbers a token: no distribution over the vocabulary outlives the expert that makes it."""
        ids_BTJ = torch.cat((ids_BTJ, targets_BT.clamp(min=0)[..., None]), -1)
        scores = self.experts.score(h_BTD.flatten(0, 1), ids_BTJ.flatten(0, 1))
        lse_BTK, said_BTJK = (each.unflatten(0, targets_BT.shape) for each in scores)
        with no_autocast(h_BTD.device):
            heard = self._filter(h_BTD, lse_BTK, said_BTJK, told, first_BK, Belief(start.now_BK, start.chosen_BK))
            nll_BT = -(heard.gate_BTK + heard.said_BTJK[:, :, -1]).logsumexp(-1)
        return torch.where(targets_BT == IGNORE, 0.0, nll_BT), heard

    def _logits(
        self, h_BTD: Tensor, ids_BTJ: Tensor, told: Told, first_BK: Tensor, start: Carried, where: str | Tensor | None
    ) -> tuple[Tensor, Heard]:
        """Log-probabilities of the mixture at ``where``, block by block of tokens: beliefs come before mixtures."""
        batch, tokens, _ = h_BTD.shape
        size = max(1, softmax.CHUNK // (batch * self.plan.plans * self.experts.vocab))
        place_BT = torch.arange(batch * tokens, device=h_BTD.device).view(batch, tokens)
        places = wanted(place_BT, where)
        before, blocks, found, order = Belief(start.now_BK, start.chosen_BK), [], [], []
        for first in range(0, tokens, size):
            part = slice(first, first + size)
            each = [x.unflatten(0, (batch, -1)) for x in self.experts.logits(h_BTD[:, part].flatten(0, 1))]
            lse_BTK = torch.stack([x.logsumexp(-1) for x in each], -1)
            said_BTJK = torch.stack([x.gather(2, ids_BTJ[:, part]) for x in each], -1)
            with no_autocast(h_BTD.device):
                heard = self._filter(h_BTD[:, part], lse_BTK, said_BTJK, told.part(part), first_BK, before)
                weights = (heard.gate_BTK - lse_BTK).unbind(-1)
                if where is None or isinstance(where, Tensor) or first + size >= tokens:
                    # Slices where they do: shapes that follow from the length alone.
                    ends = slice(None), slice(None if where is None else -1, None)
                    here = where[:, part] if isinstance(where, Tensor) else ends
                    mixed = [x[here] + w[here][..., None] for x, w in zip(each, weights, strict=True)]
                    found.append(torch.stack(mixed).logsumexp(0).flatten(0, -2))
                    order.append(place_BT[:, part][here].flatten())
            blocks.append(heard)
            before, first_BK = heard.belief.last(), heard.said_BTJK[:, -1, 0]
        logits_NV = torch.cat(found)[torch.cat(order).argsort()]
        return logits_NV.view(*places.shape, -1), Heard.joined(blocks)

    def _filter(
        self, h_BTD: Tensor, lse_BTK: Tensor, said_BTJK: Tensor, told: Told, first_BK: Tensor, before: Belief
    ) -> Heard:
        """Beliefs and gates from what the experts said: its first entry is about the next token."""
        said_BTJK = said_BTJK - lse_BTK[:, :, None]
        evidence_BTK = torch.cat((first_BK[:, None], said_BTJK[:, :-1, 0]), 1)
        if not self.plan.filtering:
            evidence_BTK = torch.zeros_like(evidence_BTK)
        elif told.silent_BT is not None:
            evidence_BTK = evidence_BTK.masked_fill(told.silent_BT[..., None], 0.0)
        chain = self.chain()
        if self.plan.control == "filtered":
            run = naive if self.plan.scan == "naive" else scan
            given = Evidence(evidence_BTK, told.context_BTK, told.start_BT, told.boundary_BT)
            found = run(chain, given, before, self._sampling(told.noise_BTN), self.plan.chunk)
            blend = lookahead(chain.moves_KK, self.plan.horizon, self.plan.feedback)
            gate_BTK = gate(found.now, blend, self.plan.temperature)
        else:
            fixed_K = self._fixed(chain)
            gate_BTK = fixed_K.expand_as(lse_BTK)
            found = Belief(gate_BTK, gate_BTK)
        return Heard(h_BTD, lse_BTK, said_BTJK, evidence_BTK, found, gate_BTK, told.boundary_BT)

    def _fixed(self, chain: Chain) -> Tensor:
        """The gate of a control, (K,)."""
        count = len(chain.prior_K)
        if self.plan.control == "frozen":
            blend = lookahead(chain.moves_KK, self.plan.horizon, self.plan.feedback)
            return gate(chain.prior_K, blend, self.plan.temperature)
        if self.plan.control == "uniform":
            return torch.full_like(chain.prior_K, -math.log(count))
        # One plan and nothing of the others, at any temperature.
        here = torch.arange(count, device=chain.prior_K.device) == self.plan.forced
        return torch.zeros_like(chain.prior_K).masked_fill(~here, -torch.inf)

    def _told(self, h_BTD: Tensor, start: Carried, ctx: Context) -> Told:
        """Where chunks begin and what the context says there: a map of their mean, or of their last, hidden state."""
        position_BT, plan, noise = ctx.positions_BT, self.plan, None
        first_BT, boundary_BT = position_BT == 0, boundary(position_BT, plan.chunk, plan.first)
        context_BTK = start.now_BK.new_zeros(*position_BT.shape, plan.plans)
        sums_BTK = None
        if self.context is not None and self.filters:
            context_BTK = F.linear(_wide(h_BTD), _wide(self.context.weight))
            if plan.context == "mean":
                # The map is linear, so what is carried of a chunk is K sums and not its hidden states.
                anew_BT = first_BT | boundary(position_BT - 1, plan.chunk, plan.first)
                assert start.heard_BK is not None
                carried_BK = start.heard_BK.masked_fill(anew_BT[:, :1], 0.0)
                joined = torch.cat((context_BTK[:, :1] + carried_BK[:, None], context_BTK[:, 1:]), 1)
                sums_BTK = segment_sums(joined, anew_BT, plan.chunk + 1)
                context_BTK = sums_BTK / self._length(position_BT)[..., None]
            context_BTK = context_BTK + _wide(self.context.bias)
        if plan.commitment == "hard" and self.filters:
            noise = uniform(ctx, SITE, 2 * plan.plans)
        return Told(context_BTK, first_BT, boundary_BT, sums_BTK, noise, ctx.images_BT)

    def _length(self, position_BT: Tensor) -> Tensor:
        """Tokens of the chunk that ends at this position: chunk, but one more in a first chunk without ``first``."""
        return torch.where(position_BT == self.plan.chunk, self.plan.chunk + 1 - self.plan.first, self.plan.chunk)

    def _surprise(self, start: Carried, ctx: Context) -> Tensor:
        """What the experts had said, one call ago, about this call's first token: (B, K)."""
        if start.h_BD is None or start.lse_BK is None:
            return torch.zeros_like(start.now_BK)
        return self.experts.at(start.h_BD, ctx.tokens_BT[:, 0]) - start.lse_BK

    def _sampling(self, noise_BTN: Tensor | None) -> Sampling | None:
        if noise_BTN is None:
            return None
        noise = gumbel(noise_BTN.to(self.chain().prior_K.dtype)).unflatten(2, (2, -1))
        return Sampling(noise, self.plan.commit_temperature, self.plan.leak)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        return self._start(batch, device, dtype) if self.filters else None

    def _start(self, batch: int, device: torch.device, dtype: torch.dtype) -> Carried:
        """Zeros: a document's first token reads none of them."""
        wide = torch.promote_types(dtype, torch.float32)
        none_BK = torch.zeros(batch, self.plan.plans, device=device, dtype=wide)
        h_BD = torch.zeros(batch, self.width, device=device, dtype=dtype) if self.plan.filtering else None
        lse_BK = none_BK if self.plan.filtering else None
        heard_BK = none_BK if self.plan.context == "mean" else None
        return Carried(none_BK, none_BK, h_BD, lse_BK, heard_BK, self.losses.init_state(none_BK))

    def cost(self) -> Cost:
        """The experts, and the context's map where there is a belief; what is in K numbers a token is elementwise."""
        params = sum(p.numel() for p in self.parameters())
        if not self.filters:
            return Cost(params, self.experts.flops)
        size = self.prior.element_size()
        wide, count = max(4, size), self.plan.plans
        numbers = 2 + self.plan.filtering + (self.plan.context == "mean")
        state = numbers * count * wide + self.plan.filtering * self.width * size
        mine = 0 if self.context is None else 2 * self.context.weight.numel()
        return Cost(params, self.experts.flops + mine, state) + self.losses.cost(self.experts, wide)


@dataclass(frozen=True)
class Told:
    """What the filter hears beside the tokens, (B, T, ...), see belief.Evidence; sums of the context inside chunks.

    silent: where no token stands (an image does), so that no expert said anything about it; None if everywhere.
    """

    context_BTK: Tensor
    start_BT: Tensor
    boundary_BT: Tensor
    sums_BTK: Tensor | None
    noise_BTN: Tensor | None
    silent_BT: Tensor | None

    def part(self, where: slice) -> Told:
        """Some tokens of it."""
        return Told(*(None if each is None else each[:, where] for each in vars(self).values()))  # type: ignore[arg-type]


def _next(tokens_BT: Tensor) -> Tensor:
    """The token after each one; after the last, of which nothing is known yet, any."""
    return F.pad(tokens_BT[:, 1:], (0, 1))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
