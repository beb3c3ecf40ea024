"""The filter of a planner: a belief over K plans, moved by what tokens say and, once a chunk, by a Markov chain.

Before the first token of a document the belief b is the prior. At every token, in this order:

    b <- norm(b + e_t)                          the evidence of the token, unless it is the document's first
    b <- norm(LSE_i(b_i + log P_ij) + c_t)      at a boundary: one move of the chain, and the evidence of the context
    b <- commit(b)                              at a document's first token and at boundaries, if plans are sampled

All in logarithms and with no epsilon, so nothing is ever forgotten by rounding and one definition serves training,
prefill and decoding. ``naive`` is this recursion as it is written. ``scan`` is the same function: between two events
(document starts and boundaries) evidence adds up, which is a segmented cumulative sum; what leads from one boundary to
the next is a K x K operator, and operators compose, so all beliefs come from one associative scan (the forward pass of
a hidden Markov model: Rabiner, 1989; in parallel: Hassan, Särkkä & García-Fernández, 2021). A sampled plan is not
linear in the belief before it; then boundaries are taken one after the other.

Suffixes as in models.base, and: K plans, E boundaries ("slots") of a call, the unused ones last.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Chain(NamedTuple):
    """prior_K: log-probabilities of the plans at a document's start. moves_KK: log P, P[i, j] = p(next j | now i)."""

    prior_K: Tensor
    moves_KK: Tensor


class Evidence(NamedTuple):
    """What the filter is told at every token.

    evidence_BTK: log-likelihood of the token under every plan, up to a constant; whatever it is where ``start_BT``.
    context_BTK: added at boundaries; whatever it is elsewhere. start_BT: first tokens of documents. boundary_BT:
    where the chain moves; two of them are at least ``chunk`` tokens apart, and so are a start and the next one.
    """

    evidence_BTK: Tensor
    context_BTK: Tensor
    start_BT: Tensor
    boundary_BT: Tensor


class Belief(NamedTuple):
    """Log-probabilities of plans. now: after the token. chosen: at the start of its chunk, before anything is sampled.

    (B, T, K), or (B, K) where carried.
    """

    now: Tensor
    chosen: Tensor

    def last(self) -> Belief:
        """What is carried on."""
        return Belief(self.now[:, -1], self.chosen[:, -1])


class Sampling(NamedTuple):
    """How a plan is sampled: Gumbel noise (B, T, 2, K), for boundaries and for starts; temperature; leak.

    The belief becomes (1 - leak) one-hot + leak / K, the one-hot with the slope of the softmax (straight-through
    Gumbel-softmax: Jang et al., 2017). The leak keeps logarithms finite.
    """

    gumbel_BT2K: Tensor
    temperature: float
    leak: float

    def at(self, log_b: Tensor, gumbel: Tensor) -> Tensor:
        """The belief after sampling."""
        soft = ((log_b + gumbel) / self.temperature).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
        plan = hard + soft - soft.detach()
        return ((1 - self.leak) * plan + self.leak / soft.shape[-1]).log()


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise from uniform numbers in [0, 1) of 24 bits."""
    return -(-(uniform + 2.0**-25).log()).log()


def move(log_b: Tensor, moves_KK: Tensor) -> Tensor:
    """log(b P), (..., K)."""
    return (log_b[..., :, None] + moves_KK).logsumexp(-2)


def naive(chain: Chain, heard: Evidence, before: Belief, sampling: Sampling | None, chunk: int) -> Belief:
    """The recursion as it is written, token by token."""
    b, chosen, found = *before, []
    for place in range(heard.start_BT.shape[1]):
        evidence, context, start, boundary = (each[:, place] for each in heard)
        start, boundary = start[:, None], boundary[:, None]
        # A fill, not a product: whatever a finished document left behind, be it infinite, is gone.
        b = torch.where(start, chain.prior_K, (b + evidence.masked_fill(start, 0.0)).log_softmax(-1))
        chosen = torch.where(start, chain.prior_K, chosen)
        if sampling is not None:
            b = torch.where(start, sampling.at(chain.prior_K, sampling.gumbel_BT2K[:, place, 1]), b)
        moved = (move(b, chain.moves_KK) + context).log_softmax(-1)
        chosen = torch.where(boundary, moved, chosen)
        if sampling is not None:
            moved = sampling.at(moved, sampling.gumbel_BT2K[:, place, 0])
        b = torch.where(boundary, moved, b)
        found.append(Belief(b, chosen))
    return Belief(*(torch.stack(each, 1) for each in zip(*found, strict=True)))


def scan(chain: Chain, heard: Evidence, before: Belief, sampling: Sampling | None, chunk: int) -> Belief:
    """The same from sums inside chunks and a scan over boundaries."""
    evidence, context, start, boundary = heard
    batch, tokens, plans = evidence.shape
    event = start | boundary
    evidence = evidence.masked_fill(start[..., None], 0.0)
    # What only adds a constant to all plans is taken out: sums stay small, and so does rounding.
    evidence = evidence - evidence.detach().amax(-1, keepdim=True)
    since_BTK = segment_sums(evidence.masked_fill(event[..., None], 0.0), event, chunk)

    # Boundaries, in slots of a static number.
    count_BT = boundary.cumsum(1)
    number = torch.arange(1, -(-tokens // chunk) + 1, device=evidence.device).expand(batch, -1)
    # An unused slot stands at the last token, and nobody reads it.
    index_BE = torch.searchsorted(count_BT, number.contiguous()).clamp(max=tokens - 1)
    earlier_BTK = F.pad(since_BTK, (0, 0, 1, 0))[:, :-1]
    found_BTK = (earlier_BTK + evidence).masked_fill(start[..., None], 0.0)  # what a boundary hears of its chunk
    begun_BT = torch.where(start, torch.arange(tokens, device=start.device), -1).cummax(1).values
    fresh_BE = begun_BT.gather(1, index_BE) > F.pad(index_BE, (1, 0), value=-1)[:, :-1]

    prior = chain.prior_K.expand(batch, 1, plans) if sampling is None else sampling.at(
        chain.prior_K, sampling.gumbel_BT2K[:, :, 1]
    )  # fmt: skip
    prior_BTK = prior.expand(batch, tokens, plans)
    prior_BTK = prior_BTK if sampling is None else rows(prior_BTK, begun_BT.clamp(min=0))
    links = Links(rows(found_BTK, index_BE), rows(context, index_BE), fresh_BE, rows(prior_BTK, index_BE))
    if sampling is None:
        chosen_BEK = _scanned(links, chain.moves_KK, before.now)
        starts_BEK = chosen_BEK
    else:
        noise = sampling.gumbel_BT2K[:, :, 0]
        chosen_BEK, starts_BEK = _in_turn(links, chain.moves_KK, before.now, sampling, rows(noise, index_BE))

    # What a token's chunk began with: the carried belief, a boundary's, or the prior if its document began since.
    anew_BT1 = (begun_BT > F.pad(index_BE, (1, 0), value=-1).gather(1, count_BT))[..., None]
    chosen_BTK = rows(torch.cat((before.chosen[:, None], chosen_BEK), 1), count_BT)
    starts_BTK = rows(torch.cat((before.now[:, None], starts_BEK), 1), count_BT)
    now_BTK = (torch.where(anew_BT1, prior_BTK, starts_BTK) + since_BTK).log_softmax(-1)
    return Belief(now_BTK, torch.where(anew_BT1, chain.prior_K, chosen_BTK))


class Links(NamedTuple):
    """From one boundary to the next: evidence of the tokens between, context, and a document start, if any.

    found, context, prior: (B, E, K). fresh_BE: whether a document began since the boundary before; with ``prior``.
    """

    found: Tensor
    context: Tensor
    fresh_BE: Tensor
    prior: Tensor


def _in_turn(
    links: Links, moves_KK: Tensor, b: Tensor, sampling: Sampling, gumbel_BEK: Tensor
) -> tuple[Tensor, Tensor]:
    """Beliefs after each boundary, before and after sampling."""
    chosen, committed = [], []
    for found, context, fresh_B, prior, noise in zip(*(each.unbind(1) for each in (*links, gumbel_BEK)), strict=True):
        b = torch.where(fresh_B[:, None], prior, b) + found
        chosen.append((move(b, moves_KK) + context).log_softmax(-1))
        b = sampling.at(chosen[-1], noise)
        committed.append(b)
    return torch.stack(chosen, 1), torch.stack(committed, 1)


def _scanned(links: Links, moves_KK: Tensor, first_BK: Tensor) -> Tensor:
    """Beliefs after each boundary, from operators log(diag(exp found) P diag(exp context)) and their products."""
    found, context, fresh_BE, prior = links
    links_BEKK = found[..., :, None] + moves_KK + context[..., None, :]
    whole_BE, span, slots = fresh_BE, 1, fresh_BE.shape[1]
    while span < slots:
        later = links_BEKK[:, span:]
        both = (links_BEKK[:, :-span, :, :, None] + later[:, :, None]).logsumexp(-2)
        # Belief comes normalised in the end, so an operator's scale means nothing; kept near 1, it rounds less.
        both = both - both.detach().amax((-2, -1), keepdim=True)
        both = torch.where(whole_BE[:, span:, None, None], later, both)
        links_BEKK = torch.cat((links_BEKK[:, :span], both), 1)
        whole_BE = torch.cat((whole_BE[:, :span], whole_BE[:, span:] | whole_BE[:, :-span]), 1)
        span *= 2
    begun = torch.where(whole_BE[..., None], prior, first_BK[:, None])
    return (begun[..., :, None] + links_BEKK).logsumexp(-2).log_softmax(-1)


def segment_sums(x_BTK: Tensor, first_BT: Tensor, longest: int) -> Tensor:
    """Running sums along T that begin afresh where ``first_BT``; no run may be longer than ``longest``.

    By doubling, log2(longest) sums: nothing of an earlier run is added and taken away again, so none of its rounding,
    or of its infinities, comes through.
    """
    span = 1
    while span < min(longest, x_BTK.shape[1]):
        more = x_BTK[:, :-span].masked_fill(first_BT[:, span:, None], 0.0)
        x_BTK = torch.cat((x_BTK[:, :span], x_BTK[:, span:] + more), 1)
        first_BT = torch.cat((first_BT[:, :span], first_BT[:, span:] | first_BT[:, :-span]), 1)
        span *= 2
    return x_BTK


def rows(x: Tensor, index_BN: Tensor) -> Tensor:
    """x (B, T, K) at the places ``index_BN`` of its second axis: (B, N, K)."""
    return x.gather(1, index_BN[..., None].expand(-1, -1, x.shape[2]))


def lookahead(moves_KK: Tensor, horizon: int, share: float) -> Tensor | None:
    """log M of M = (1 - share) I + share / horizon (P + ... + P^horizon), or None where M = I.

    Blending a belief with its mean forecast over ``horizon`` chunks is the product with this fixed matrix.
    """
    if not horizon or not share:
        return None
    p_KK = moves_KK.exp()
    powers, total = p_KK, p_KK
    for _ in range(horizon - 1):
        powers = powers @ p_KK
        total = total + powers
    blend = (1 - share) * torch.eye(len(p_KK), dtype=p_KK.dtype, device=p_KK.device) + share / horizon * total
    return blend.clamp_min(torch.finfo(p_KK.dtype).tiny).log()


def gate(log_b: Tensor, blend_KK: Tensor | None, temperature: float) -> Tensor:
    """Log-weights of the mixture from a belief: blended with its forecast, then sharpened."""
    log_b = log_b if blend_KK is None else move(log_b, blend_KK)
    return log_b if math.isclose(temperature, 1.0) else (log_b / temperature).log_softmax(-1)
