"""What a planner may be trained for beside the likelihood: named terms, one number a token, each with a price.

A term at a token is made from that token and what came before it, so that it does not depend on batch-mates, on how a
text was cut into calls, or on the future; a mean over tokens stands for the mean that the ancestor takes over a batch.
With a price of 0 a term, its parameters and its state do not exist.

token_entropy (H_tok): entropy of the belief after the token.
boundary_entropy (H_bnd): entropy of the belief at the start of the token's chunk. A price makes it *sharper*.
usage (KL_use): log K + sum_k b_k log q_k of the same belief, with q learned by maximum likelihood. At the best q, the
    mean of all b, the mean of the term is KL(mean b || uniform), and so is its slope. Usage and boundary_entropy at
    one price add up to log K less the mutual information of plan and chunk: together they maximise it.
posterior (CPK): at the end of a chunk, half the symmetric KL between the belief and the softmax of a map of the chunk's
    mean hidden state; times the chunk's length, so that a mean over tokens is one over chunks.
plan_mi (MI): - [ H(sum_k g_k p_k) - sum_k g_k H(p_k) ], the information of the plan about the next token, maximised.
plan_js (JS): - mean over pairs i < j of JS(p_i, p_j), maximised; at most ln 2, which experts of disjoint words reach.
repetition (REPU): mean over the different ids u of the last ``window`` tokens, other than the token that came, of
    -log(1 - p(u)); told at the token that came. The window ends with the token before it.
bag_of_words (BOW): see heads.bag.
contrastive (FCL): see heads.foresight.

The terms over the whole vocabulary are made on a share ``sampled`` of the tokens, drawn by the call's key, and divided
by it: no bias, less cost. There is room for more than that share (see ``room``), so that shapes follow from the length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepladder.core.errors import UserError
from stepladder.models.base import IGNORE, Context, Cost
from stepladder.models.heads import bag
from stepladder.models.heads.belief import Belief, rows, segment_sums
from stepladder.models.heads.experts import Experts
from stepladder.models.heads.foresight import Foresight, Remembered
from stepladder.models.noise import uniform

SITE = -(2**20) - 1

BLOCK = 2**21
"""At most this many logits of all experts exist at a time in terms over the whole vocabulary: 8 MiB in float32."""

NAMES = (
    "token_entropy",
    "boundary_entropy",
    "usage",
    "posterior",
    "plan_mi",
    "plan_js",
    "repetition",
    "bag_of_words",
    "contrastive",
)


@dataclass(frozen=True)
class Heard:
    """All that a planner knows of the tokens of a call, (B, T, ...).

    said_BTJK: log-probabilities under every expert of the next token, then of the ids that the losses ask for.
    evidence: said of the token itself, one token earlier.
    """

    h_BTD: Tensor
    lse_BTK: Tensor
    said_BTJK: Tensor
    evidence_BTK: Tensor
    belief: Belief
    gate_BTK: Tensor
    boundary_BT: Tensor

    @staticmethod
    def joined(parts: Sequence[Heard]) -> Heard:
        """What was heard block after block."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        whole = [
            Belief(*(torch.cat(each, 1) for each in zip(*column, strict=True)))
            if isinstance(column[0], Belief)
            else torch.cat(column, 1)
            for column in columns
        ]
        return Heard(*whole)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Carried:
    """What terms carry, (B, ...): beliefs; the chunk's sums for ``posterior``; ids and log p for ``repetition``.

    ids: IGNORE where a token is no word, but an image's slot.
    """

    now_BK: Tensor
    chosen_BK: Tensor
    sums_BK: Tensor | None
    ids_BW: Tensor | None
    said_BW: Tensor | None
    bag: bag.Remembered | None
    foresight: Remembered | None


class PlanLosses(nn.Module):
    """The terms with a price. chunk, first: of the planner. ``sampled``, ``window``: see the module."""

    def __init__(
        self,
        prices: Mapping[str, float],
        width: int,
        plans: int,
        chunk: int,
        first: int,
        window: int,
        sampled: float,
        foresight: Foresight,
    ) -> None:
        super().__init__()
        self.prices = {name: price for name, price in prices.items() if price}
        self.width, self.plans, self.chunk, self.first, self.sampled = width, plans, chunk, first, sampled
        self.window = window if "repetition" in self.prices else 0
        self.marginal = nn.Parameter(torch.zeros(plans)) if "usage" in self.prices else None
        self.posterior = nn.Linear(width, plans) if "posterior" in self.prices else None
        self.foresight = foresight if "contrastive" in self.prices else None
        if self.foresight is not None and chunk < 2:
            raise UserError("contrastive: chunks of one token have nothing to foresee; raise chunk, or leave it out")
        if self.posterior is not None:
            nn.init.normal_(self.posterior.weight, std=1 / math.sqrt(width))
            nn.init.zeros_(self.posterior.bias)

    def ids(self, state: Carried | None, ctx: Context) -> Tensor:
        """Ids whose probability the terms want at every token: the last ``window`` ones, (B, T, W)."""
        if not self.window:
            return ctx.tokens_BT[..., None][..., :0]
        assert state is not None
        assert state.ids_BW is not None
        return torch.cat((state.ids_BW, _words(ctx)), 1).clamp(min=0).unfold(1, self.window, 1)[:, 1:]

    def forward(
        self, heard: Heard, experts: Experts, state: Carried | None, ctx: Context, scored: bool
    ) -> Carried | None:
        """Add the terms to the context, if the call is ``scored``, and give what to carry on."""
        add = self._adder(ctx, scored)
        now, chosen = heard.belief
        add("token_entropy", lambda: entropy(now))
        add("boundary_entropy", lambda: entropy(chosen))
        if self.marginal is not None:
            marginal = self.marginal.to(chosen.dtype)
            add("usage", lambda: usage(chosen, marginal))
        if scored and ("plan_mi" in self.prices or "plan_js" in self.prices):
            mi, js = self._over_words(heard, experts, ctx)
            add("plan_mi", lambda: -mi)
            add("plan_js", lambda: -js)
        if state is None:
            return None
        sums_BTK, said_BW = None, None
        if self.posterior is not None:
            sums_BTK = self._sums(heard, state, ctx)
            before_BTK = torch.cat((state.now_BK[:, None], now[:, :-1]), 1)
            add("posterior", lambda: self._posterior(before_BTK, sums_BTK, heard, ctx))
        ids_BW = None
        if self.window:
            assert state.ids_BW is not None
            assert state.said_BW is not None
            said_BTWK = heard.said_BTJK[:, :, 1 : 1 + self.window]
            said_BTW = (heard.gate_BTK[:, :, None] + said_BTWK).logsumexp(-1)
            said_BW = said_BTW[:, -1]
            earlier_BTW = torch.cat((state.said_BW[:, None], said_BTW[:, :-1]), 1)
            ids = torch.cat((state.ids_BW, _words(ctx)), 1)
            ids_BW = ids[:, -self.window :].clone()
            add("repetition", lambda: repetition(earlier_BTW, ids.unfold(1, self.window, 1)[:, :-1], ctx))
        words, foresight = None, None
        earlier_BTK = torch.cat((state.chosen_BK[:, None], chosen[:, :-1]), 1)
        if state.bag is not None:
            said = heard.h_BTD, heard.lse_BTK, _words(ctx)
            bag_BT, words = bag.bag_of_words(
                experts, *said, earlier_BTK, heard.boundary_BT, state.bag, ctx, scored=scored
            )
            if bag_BT is not None:
                ctx.add_loss("bag_of_words", self.prices["bag_of_words"] * bag_BT)
        if self.foresight is not None:
            assert state.foresight is not None
            position_BT = ctx.positions_BT
            order_BT = (position_BT + self.first) // self.chunk - 1
            ends = heard.boundary_BT, self._anew(ctx), order_BT
            miss_BT, foresight = self.foresight(heard.h_BTD, earlier_BTK, *ends, state.foresight, ctx)
            add("contrastive", lambda: miss_BT)
        last_BK = None if sums_BTK is None else sums_BTK[:, -1]
        return Carried(now[:, -1], chosen[:, -1], last_BK, ids_BW, said_BW, words, foresight)

    def _anew(self, ctx: Context) -> Tensor:
        """Whether a token is the first of its chunk."""
        return (ctx.positions_BT == 0) | boundary(ctx.positions_BT - 1, self.chunk, self.first)

    def _adder(self, ctx: Context, scored: bool) -> Callable[[str, Callable[[], Tensor]], None]:
        def add(name: str, term: Callable[[], Tensor]) -> None:
            if scored and name in self.prices:
                ctx.add_loss(name, self.prices[name] * term())

        return add

    def _sums(self, heard: Heard, state: Carried, ctx: Context) -> Tensor:
        """The map of hidden states, summed inside chunks."""
        assert self.posterior is not None
        assert state.sums_BK is not None
        anew_BT = self._anew(ctx)
        mine_BTK = F.linear(heard.h_BTD.to(state.sums_BK.dtype), self.posterior.weight.to(state.sums_BK.dtype))
        carried_BK = state.sums_BK.masked_fill(anew_BT[:, :1], 0.0)
        joined = torch.cat((mine_BTK[:, :1] + carried_BK[:, None], mine_BTK[:, 1:]), 1)
        return segment_sums(joined, anew_BT, self.chunk + 1)

    def _posterior(self, before_BTK: Tensor, sums_BTK: Tensor | None, heard: Heard, ctx: Context) -> Tensor:
        assert self.posterior is not None
        assert sums_BTK is not None
        length_BT = torch.where(ctx.positions_BT == self.chunk, self.chunk + 1 - self.first, self.chunk)
        bias_K = self.posterior.bias.to(sums_BTK.dtype)
        # At the first token of a document, all is the prior's: chunks of one token end there.
        start_BT1 = (ctx.positions_BT == 0)[..., None]
        p_BTK = (before_BTK + heard.evidence_BTK.masked_fill(start_BT1, 0.0)).log_softmax(-1)
        p_BTK = torch.where(start_BT1, heard.belief.chosen, p_BTK)
        q_BTK = (sums_BTK / length_BT[..., None] + bias_K).log_softmax(-1)
        return torch.where(heard.boundary_BT, self.chunk * symmetric(p_BTK, q_BTK), 0.0)

    def _over_words(self, heard: Heard, experts: Experts, ctx: Context) -> tuple[Tensor, Tensor]:
        """MI and JS (B, T) on the sampled tokens, 0 at the others."""
        drawn_BT = uniform(ctx, SITE, 1)[..., 0] < self.sampled
        batch, tokens = drawn_BT.shape
        places, count_BT = room(tokens, self.sampled), drawn_BT.cumsum(1)
        number = torch.arange(1, places + 1, device=count_BT.device).expand(batch, -1)
        index_BE = torch.searchsorted(count_BT, number.contiguous()).clamp(max=tokens - 1)
        h_ND, gate_NK = (rows(each, index_BE).flatten(0, 1) for each in (heard.h_BTD, heard.gate_BTK))
        size = max(1, BLOCK // (experts.plans * experts.vocab))
        names = "plan_mi" in self.prices, "plan_js" in self.prices
        found = [
            checkpoint(_over_words, h, g, experts, *names, use_reentrant=False, preserve_rng_state=False)
            for h, g in zip(h_ND.split(size), gate_NK.split(size), strict=True)
        ]
        both_BE2 = torch.cat(found).unflatten(0, (batch, places)) / self.sampled
        both_BT2 = rows(both_BE2, (count_BT - 1).clamp(0, places - 1))
        mi, js = torch.where((drawn_BT & (count_BT <= places))[..., None], both_BT2, 0.0).unbind(-1)
        return mi, js

    def init_state(self, like_BK: Tensor) -> Carried | None:
        """At the start of a sequence: zeros, which are never read."""
        if not self._remembers:
            return None
        ids = said = None
        if self.window:
            said = like_BK.new_zeros(len(like_BK), self.window)
            ids = said.long()
        sums_BK = None if self.posterior is None else like_BK
        foresight = None if self.foresight is None else self.foresight.init_state(like_BK)
        words = bag.Remembered.start(like_BK, self.chunk, self.width) if "bag_of_words" in self.prices else None
        return Carried(like_BK, like_BK, sums_BK, ids, said, words, foresight)

    @property
    def _remembers(self) -> bool:
        """Whether any term needs more than the call's own tokens."""
        return any(name in self.prices for name in ("posterior", "repetition", "bag_of_words", "contrastive"))

    def cost(self, experts: Experts, size: int) -> Cost:
        """FLOPs and state bytes, ``size`` a number; what is made of targets and samples is training's alone."""
        found = Cost()
        if "plan_mi" in self.prices or "plan_js" in self.prices:
            found += Cost(lessons=3 * self.sampled * experts.flops)
        if not self._remembers:
            return found
        found += Cost(state_bytes=2 * self.plans * size + self.window * (size + 8))
        if "bag_of_words" in self.prices:
            state = self.chunk * ((self.width + self.plans) * size + 8)
            found += Cost(state_bytes=state, lessons=3 * self.chunk * experts.flops / experts.vocab)
        if self.posterior is not None:
            found = found + Cost(0, 2 * self.posterior.weight.numel(), self.plans * size)
        return found if self.foresight is None else found + self.foresight.cost(size)


def room(tokens: int, share: float) -> int:
    """Places for the drawn ones of a row's tokens; of one row in 10^9 more are drawn, and the last are left out."""
    mean = share * tokens
    return min(tokens, math.ceil(mean + 6 * math.sqrt(mean * (1 - share)) + 6))


def _words(ctx: Context) -> Tensor:
    """Ids of the tokens, IGNORE where an image stands."""
    return ctx.tokens_BT if ctx.images_BT is None else ctx.tokens_BT.masked_fill(ctx.images_BT, IGNORE)


def boundary(position_BT: Tensor, chunk: int, first: int) -> Tensor:
    """Whether the chain moves behind the token at this position of its document."""
    moved_BT = position_BT + first
    return (moved_BT % chunk == 0) & (moved_BT > 0)


def entropy(log_b: Tensor) -> Tensor:
    """In nats, over the last axis."""
    return -(log_b.exp() * log_b).sum(-1)


def usage(log_b: Tensor, marginal_K: Tensor) -> Tensor:
    """log K + sum_k b_k log q_k, whose slope in q is reversed: beliefs go where q is small, q goes where they are."""
    b, log_q = log_b.exp(), marginal_K.log_softmax(-1)
    fit = (b.detach() * log_q).sum(-1)
    return math.log(log_b.shape[-1]) + (b * log_q.detach()).sum(-1) - (fit - fit.detach())


def symmetric(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2."""
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def repetition(said_BTW: Tensor, ids_BTW: Tensor, ctx: Context) -> Tensor:
    """See the module. said: log p of the ids of the window before each token, as told before it."""
    window = ids_BTW.shape[-1]
    lag_W = torch.arange(window, 0, -1, device=ids_BTW.device)
    same_BTWW = ids_BTW[..., :, None] == ids_BTW[..., None, :]
    later_WW = torch.ones(window, window, dtype=torch.bool, device=ids_BTW.device).triu(1)
    word_BT1 = _words(ctx)[..., None]
    meant = (ctx.positions_BT[..., None] >= lag_W) & (ids_BTW != word_BT1) & (ids_BTW >= 0) & (word_BT1 >= 0)
    meant &= ~(same_BTWW & later_WW).any(-1)
    p = said_BTW.masked_fill(~meant, -torch.inf).exp().clamp(max=1 - 1e-6)
    return torch.where(meant, -torch.log1p(-p), 0.0).sum(-1) / meant.sum(-1).clamp(min=1)


def _over_words(h_ND: Tensor, gate_NK: Tensor, experts: Experts, mi: bool, js: bool) -> Tensor:
    """MI and JS of some tokens, (N, 2); 0 for the one that is not asked for."""
    logs = [logits.log_softmax(-1) for logits in experts.logits(h_ND)]
    none_N = torch.zeros_like(gate_NK[:, 0])
    return torch.stack((information(logs, gate_NK) if mi else none_N, divergence(logs) if js else none_N), -1)


def information(logs: Sequence[Tensor], gate_NK: Tensor) -> Tensor:
    """H(sum_k g_k p_k) - sum_k g_k H(p_k) from K tensors log p_k (N, V)."""
    mixed = torch.stack([each + g[:, None] for each, g in zip(logs, gate_NK.unbind(1), strict=True)]).logsumexp(0)
    parts = torch.stack([entropy(each) for each in logs], -1)
    return entropy(mixed) - (gate_NK.exp() * parts).sum(-1)


def divergence(logs: Sequence[Tensor]) -> Tensor:
    """Mean over pairs of the Jensen-Shannon divergence, from K tensors log p_k (N, V); 0 for one alone."""
    total = torch.zeros_like(logs[0][:, 0])
    for each in pairs(logs):
        total = total + each
    return total / max(1, len(logs) * (len(logs) - 1) // 2)


def pairs(logs: Sequence[Tensor]) -> Iterator[Tensor]:
    """The Jensen-Shannon divergence (N,) of every pair (1, 0), (2, 0), (2, 1), ..."""
    for i in range(len(logs)):
        for j in range(i):
            middle = torch.logaddexp(logs[i], logs[j]) - math.log(2)
            both = [(each.exp() * (each - middle)).sum(-1) for each in (logs[i], logs[j])]
            yield (both[0] + both[1]) / 2
