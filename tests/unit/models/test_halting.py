"""Halting policies, alone: weights by hand, the cap, the price's slope, and who is left out."""

from __future__ import annotations

import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.models.halting import ACT, Fixed

WIDE = torch.float64


def act(ticks=4, min_ticks=1, epsilon=0.01, price=1.0):
    """A policy that reads its logit off the first of two channels, see ``states``."""
    policy = ACT(2, ticks, min_ticks, epsilon, price).double()
    with torch.no_grad():
        policy.weight.copy_(torch.tensor([10.0, 0.0]))
        policy.bias.fill_(0.0)
    return policy


def states(p_N):
    """States (1, N, 2) of length 10 for which that policy's halting probabilities are ``p_N``."""
    logits_N = torch.logit(torch.tensor(p_N, dtype=WIDE))
    return torch.stack((logits_N, (100 - logits_N**2).sqrt()), -1)[None]


def run(policy, p_NK, ticks, running_N=None):
    """All ticks over states with these halting probabilities: weights (N, K) and the last progress."""
    found = [states(p_N) for p_N in zip(*p_NK, strict=True)]
    running_BN = torch.ones(1, len(p_NK), dtype=torch.bool) if running_N is None else torch.tensor([running_N])
    progress, weights = policy.start(running_BN, WIDE), []
    for tick in range(1, ticks + 1):
        weight, progress = policy(found[tick - 1], found[tick - 2], progress, tick, ticks)
        weights.append(weight)
    return torch.stack(weights, -1)[0], progress


@pytest.mark.parametrize(
    ("p", "weights", "ticks"),
    [
        ([0.3, 0.4, 0.5, 0.9], [0.3, 0.4, 0.3, 0.0], 3),  # the third crosses 1 and gets the remainder
        ([0.995, 0.5, 0.5, 0.5], [1.0, 0.0, 0.0, 0.0], 1),
        ([0.5, 0.495, 0.5, 0.5], [0.5, 0.5, 0.0, 0.0], 2),  # within epsilon of 1
        ([0.5, 0.485, 0.5, 0.5], [0.5, 0.485, 0.015, 0.0], 3),  # not within epsilon
        ([0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7], 4),  # the cap: the remainder is not lost
    ],
)
def test_weights_are_the_mass_and_the_remainder(p, weights, ticks):
    found, progress = run(act(), [p], 4)
    torch.testing.assert_close(found[0], torch.tensor(weights, dtype=WIDE))
    assert int(progress.ticks) == ticks
    assert not bool(progress.running)
    expected = sum(tick * weight for tick, weight in enumerate(weights, 1))
    assert progress.expected.item() == pytest.approx(expected)
    held = p[ticks - 1]
    assert progress.offer.item() == pytest.approx(held)


def test_the_cap_is_the_budget_of_the_call():
    found, progress = run(act(ticks=8), [[0.1, 0.2]], 2)
    torch.testing.assert_close(found[0], torch.tensor([0.1, 0.9], dtype=WIDE))
    assert int(progress.ticks) == 2


def test_nothing_halts_before_min_ticks_and_the_cap_is_above_it():
    policy = act(min_ticks=3)
    found, progress = run(policy, [[0.999, 0.999, 0.999, 0.5]], 4)
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=WIDE))
    assert int(progress.ticks) == 3
    found, progress = run(policy, [[0.999, 0.999]], 2)
    torch.testing.assert_close(found[0], torch.tensor([0.0, 1.0], dtype=WIDE))
    assert policy.least(4) == 3
    assert policy.least(2) == 2


def test_places_are_decided_alone_and_those_left_out_weigh_nothing():
    p = [[0.3, 0.4, 0.5, 0.9], [0.999] * 4, [0.1] * 4]
    together, progress = run(act(), p, 4, running_N=[True, True, False])
    alone = torch.cat([run(act(), [row], 4)[0] for row in p])
    assert torch.equal(together[:2], alone[:2])
    assert not together[2].any()
    assert progress.ticks.tolist() == [[3, 1, 0]]


def test_S7_the_price_falls_when_any_earlier_probability_rises():
    """Minimising expected ticks shortens (the ancestor's price had the other sign): slope -(n - k) before n."""
    policy = act()
    _, progress = run(policy, [[0.3, 0.4, 0.5, 0.9]], 4)
    progress.expected.sum().backward()
    assert policy.bias.grad.item() == pytest.approx(-2 * 0.3 * 0.7 - 1 * 0.4 * 0.6)


def test_the_price_does_not_teach_states_to_please_the_head():
    z_BND = states([0.3, 0.6]).requires_grad_()
    policy = act()
    progress = policy.start(torch.ones(1, 2, dtype=torch.bool), WIDE)
    weights = []
    for tick in (1, 2, 3):
        weight, progress = policy(z_BND, z_BND, progress, tick, 3)
        weights.append(weight)
    assert torch.autograd.grad(progress.expected.sum(), z_BND, retain_graph=True, allow_unused=True) == (None,)
    value = sum((weight[..., None] * z_BND).sum() for weight in weights)
    assert bool(torch.autograd.grad(value, z_BND)[0].all())


def test_a_state_cannot_halt_by_growing():
    policy, ones = act(), torch.ones(1, 1, dtype=torch.bool)
    small, large = (policy(size * states([0.7]), states([0.7]), policy.start(ones, WIDE), 1, 4)[0] for size in (1, 1e3))
    torch.testing.assert_close(small, large)


@pytest.mark.parametrize(("ticks", "min_ticks"), [(2, 1), (4, 1), (8, 2), (5, 4)])
def test_expected_ticks_start_midway_and_no_weight_is_zero(ticks, min_ticks):
    policy = ACT(16, ticks, min_ticks, 0.01, 1.0)
    z_BND = torch.randn(2, 3, 16)
    progress, weights = policy.start(torch.ones(2, 3, dtype=torch.bool), torch.float32), []
    for tick in range(1, ticks + 1):
        weight, progress = policy(z_BND, z_BND, progress, tick, ticks)
        weights.append(weight.mean().item())
    torch.testing.assert_close(progress.expected, torch.full((2, 3), (ticks + min_ticks) / 2))
    assert weights == pytest.approx([0.0] * (min_ticks - 1) + [1 / (ticks - min_ticks + 1)] * (ticks - min_ticks + 1))


def test_mass_is_kept_in_float32_when_states_are_not():
    """In bfloat16 1 - 0.999 is 0 or 0.0039, and a threshold of 0.999 is 1."""
    policy = ACT(4, 3, 1, 0.001, 1.0).bfloat16()
    with torch.no_grad():
        policy.bias.fill_(5.0)  # p = 0.9933: one tick is not enough, two are
    z_BND = torch.zeros(1, 2, 4, dtype=torch.bfloat16)
    progress, total = policy.start(torch.ones(1, 2, dtype=torch.bool), z_BND.dtype), 0.0
    for tick in (1, 2, 3):
        weight, progress = policy(z_BND, z_BND, progress, tick, 3)
        assert weight.dtype == torch.float32
        total = total + weight
    torch.testing.assert_close(total, torch.ones(1, 2), rtol=0, atol=1e-7)
    assert progress.ticks.tolist() == [[2, 2]]


def test_fixed_gives_everything_to_the_last_state():
    policy = Fixed()
    found, progress = run(policy, [[0.5, 0.9, 0.1], [0.999] * 3], 3)
    assert found.tolist() == [[0.0, 0.0, 1.0]] * 2
    assert progress.ticks.tolist() == [[3, 3]]
    assert progress.expected.tolist() == [[3.0, 3.0]]
    assert policy.least(7) == 7
    assert policy.cost().params == 0


def test_a_policy_with_nothing_to_decide_is_refused():
    with pytest.raises(UserError, match="min_ticks=3 and ticks=3 leave nothing to decide"):
        ACT(4, 3, 3, 0.01, 1.0)
