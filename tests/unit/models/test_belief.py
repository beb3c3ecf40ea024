"""The filter: scan = recursion, in values and slopes; and both are the forward pass of a hidden Markov model."""

from __future__ import annotations

import itertools

import pytest
import torch

from stepladder.models.heads import belief
from stepladder.models.heads.belief import Belief, Chain, Evidence, Sampling

K = 4


def some(tokens, chunk, first, packed, sharp=1.0, seed=0, batch=3, carried=False):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()  # noqa: E731
    cut = torch.rand(batch, tokens, generator=g) < (0.15 if packed else 0)
    cut[:, 0] |= not carried
    index = torch.arange(tokens)
    begun = torch.where(cut, index, -1).cummax(1).values
    positions = torch.where(begun >= 0, index - begun, index + 5)
    boundary = (positions + first) % chunk == 0
    boundary &= positions + first > 0
    raw = [draw(K), draw(K, K), draw(batch, tokens, K), draw(batch, tokens, K), draw(batch, K), draw(batch, K)]
    prior, moves, evidence, context, now, chosen = raw
    chain = Chain(prior.log_softmax(0), moves.log_softmax(1))
    before = Belief(now.log_softmax(1), chosen.log_softmax(1))
    return raw, chain, Evidence(sharp * evidence, context, positions == 0, boundary), before, g


def sampled(g, batch, tokens, how):
    noise = belief.gumbel(torch.rand(batch, tokens, 2, K, generator=g, dtype=torch.float64))
    return Sampling(noise, 0.7, 1e-3) if how else None


@pytest.mark.parametrize("sample", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("sharp", [1.0, 30.0])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize(("chunk", "first"), [(1, 1), (1, 0), (4, 1), (4, 0), (16, 1), (50, 0)])
def test_a4_scan_is_the_recursion(chunk, first, packed, sharp, sample):
    for tokens, carried in itertools.product((1, 2, 37), (False, True)):
        raw, chain, heard, before, g = some(tokens, chunk, first, packed, sharp, carried=carried)
        sampling = sampled(g, 3, tokens, sample)
        found = [way(chain, heard, before, sampling, chunk) for way in (belief.naive, belief.scan)]
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-10 * sharp)
        weights = torch.randn(found[0].now.shape, generator=g, dtype=torch.float64)
        slopes = [
            torch.autograd.grad(
                (each.now * weights + each.chosen.exp()).sum(), raw, allow_unused=True, retain_graph=True
            )
            for each in found
        ]
        for ours, theirs in zip(*slopes, strict=True):
            if theirs is None or ours is None:
                assert not any(each is not None and bool(each.any()) for each in (ours, theirs))
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * sharp)


def test_a3_beliefs_sum_to_one():
    _, chain, heard, before, _ = some(37, 4, 1, True, sharp=30.0)
    for each in belief.scan(chain, heard, before, None, 4):
        torch.testing.assert_close(each.exp().sum(-1), torch.ones(3, 37, dtype=torch.float64), rtol=0, atol=1e-12)


def test_it_is_the_forward_pass_of_a_hidden_markov_model():
    """Against the sum over all sequences of plans, in plain probabilities."""
    _, chain, heard, before, _ = some(6, 2, 1, False, batch=1)
    prior, moves = chain.prior_K.exp(), chain.moves_KK.exp()
    evidence, context = heard.evidence_BTK[0].exp(), heard.context_BTK[0].exp()
    total = torch.zeros(K, dtype=torch.float64)
    for plans in itertools.product(range(K), repeat=4):  # chunks: token 0; 1, 2; 3, 4; 5
        weight = prior[plans[0]]
        for place in range(1, 6):
            weight = weight * evidence[place, plans[(place - 1 + 1) // 2]]
            if place % 2:
                weight = weight * moves[plans[(place - 1) // 2], plans[(place + 1) // 2]]
                weight = weight * context[place, plans[(place + 1) // 2]]
        total[plans[3]] += weight
    got = belief.scan(chain, heard, before, None, 2).now[0, -1].exp()
    torch.testing.assert_close(got, total / total.sum(), rtol=0, atol=1e-12)


def test_what_a_finished_document_left_behind_is_gone():
    """Infinite and undefined numbers of one document reach neither beliefs nor slopes of the next."""
    _, chain, heard, before, _ = some(20, 4, 1, False)
    start = heard.start_BT.clone()
    start[:, 7] = True
    positions = torch.arange(20).where(torch.arange(20) < 7, torch.arange(20) - 7)
    heard = heard._replace(start_BT=start, boundary_BT=((positions + 1) % 4 == 0).expand(3, -1))
    for way in (belief.naive, belief.scan):
        want = way(chain, heard, before, None, 4).now[:, 7:]
        bad = heard.evidence_BTK.detach().clone()
        bad[:, 1:7] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e300])
        got = way(chain, heard._replace(evidence_BTK=bad), before, None, 4).now[:, 7:]
        assert torch.equal(got, want)


def test_a5_the_blend_is_the_explicit_lookahead():
    _, chain, heard, before, _ = some(9, 3, 1, False)
    now = belief.scan(chain, heard, before, None, 3).now
    for horizon, share in ((0, 0.5), (1, 0.25), (2, 0.25), (3, 1.0), (2, 0.0)):
        b, moves = now.exp(), chain.moves_KK.exp()
        forecasts = [b @ torch.linalg.matrix_power(moves, s) for s in range(1, horizon + 1)]
        blended = (1 - share) * b + share * sum(forecasts) / horizon if horizon and share else b
        for temperature in (1.0, 0.5, 3.0):
            want = (blended.log() / temperature).softmax(-1)
            got = belief.gate(now, belief.lookahead(chain.moves_KK, horizon, share), temperature).exp()
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_sampled_plan_follows_the_belief_and_keeps_it_sampled():
    g = torch.Generator().manual_seed(0)
    prior = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    noise = belief.gumbel(torch.rand(20000, 3, generator=g, dtype=torch.float64))
    plans = Sampling(noise, 1.0, 1e-6).at(prior, noise).exp()
    assert float(plans.amax(-1).min()) > 0.999
    torch.testing.assert_close(plans.mean(0), prior.exp(), rtol=0, atol=0.015)
