"""Policies alone: weights and charges by hand, where gradients go, what is refused, and that mass always closes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from stepladder.core.config import validate
from stepladder.core.errors import UserError
from stepladder.models.halting import ACT, Halting, Progress
from stepladder.models.policies import POLICIES, Controller, Convergence, Geometric
from stepladder.models.zoo import spec

WIDE = torch.float64
D = 6


def run(policy, states, luck=None):
    """Weights (K, B, N) and the last progress over these states (the first one is the start)."""
    running = torch.ones(states[0].shape[:2], dtype=torch.bool)
    progress, weights, ticks = policy.start(running, WIDE, luck), [], len(states) - 1
    for tick in range(1, ticks + 1):
        weight, progress = policy(states[tick], states[tick - 1], progress, tick, ticks)
        weights.append(weight)
    return torch.stack(weights), progress


def states(count, places=50, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, places, D, generator=g, dtype=WIDE) for _ in range(count)]


def built(name, ticks=5, stir=1.0, **fields):
    policy = validate(POLICIES.get(name), {"kind": name, **fields}, "policy").build(D, ticks).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(stir * torch.randn(parameter.shape, generator=g, dtype=WIDE))
    return policy


class NoRemainder(ACT):
    """The ancestor at the cap: a place that never reaches the threshold keeps what it has."""

    def forward(self, new, old, before, tick, ticks):
        return super().forward(new, old, before, tick, ticks + 1)


class ScaledMass(ACT):
    """The ancestor's halting_mass_scale: what is accumulated shrinks at every tick."""

    def forward(self, new, old, before, tick, ticks):
        weight, after = super().forward(new, old, before, tick, ticks)
        return weight, replace(after, left=torch.where(after.running, 1 - (1 - after.left) * 1e-4, after.left))


def closes(policy):
    """The largest distance of a place's summed weights from 1."""
    weights, _ = run(policy, states(6))
    return (weights.sum(0) - 1).abs().max().item()


@pytest.mark.parametrize("name", POLICIES.names())
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_weights_close_to_one_and_expected_ticks_are_theirs(name, scale):
    policy = built(name, **({"halting_mass_scale": scale} if name == "act" else {}))
    weights, progress = run(policy, states(6))
    assert closes(policy) < 1e-12
    assert bool((weights >= 0).all())
    number = torch.arange(1.0, 6.0, dtype=WIDE)[:, None, None]
    executed = torch.where(weights > 0, number, 0).amax(0)
    assert torch.equal(executed.long(), progress.ticks)  # the last tick that was executed has a weight, no later one
    if policy.mixes:
        torch.testing.assert_close(progress.expected, (number * weights).sum(0))
    else:
        assert set(weights.unique().tolist()) == {0.0, 1.0}


def test_without_a_remainder_or_with_a_rescaled_mass_it_shows():
    for broken in (NoRemainder, ScaledMass):
        policy = broken(D, 5, 1, 0.01, 0.0).double()
        with torch.no_grad():
            policy.bias.fill_(-3.0)
        assert closes(policy) > 0.05, broken.__name__


def test_the_scale_is_credit_for_a_tick_and_nothing_else():
    """At scale c, states of probability p weigh what states of probability c p weigh at scale 1."""
    plain, scaled = (ACT(D, 5, 1, 0.01, 0.0, scale).double() for scale in (1.0, 0.5))
    with torch.no_grad():
        plain.bias.fill_(math.log(0.2 / 0.8))
        scaled.bias.fill_(math.log(0.4 / 0.6))
    torch.testing.assert_close(run(plain, states(6))[0], run(scaled, states(6))[0])


@pytest.mark.parametrize("scale", [1e-4, 0.2])
def test_a_scale_at_which_nothing_could_halt_is_refused(scale):
    with pytest.raises(UserError, match=r"halting_mass_scale=.*none would ever halt; raise it above 0\.2"):
        built("act", halting_mass_scale=scale, tau=0.9)
    with pytest.raises(UserError, match="halting_mass_scale"):
        spec("recursive_halting", "tiny", policy={"kind": "act", "halting_mass_scale": 1e-4}).build(11)


def test_at_the_least_scale_allowed_a_sure_place_halts_before_the_cap():
    policy = ACT(D, 5, 1, 0.1, 0.0, 0.23).double()
    with torch.no_grad():
        policy.bias.fill_(20.0)
    assert run(policy, states(6))[1].ticks.max() == 4


@pytest.mark.parametrize("name", ["act", "ponder", "convergence", "controller"])
def test_a_policy_with_nothing_to_decide_is_refused_and_min_ticks_are_kept(name):
    with pytest.raises(UserError, match="min_ticks=5 and ticks=5 leave nothing to decide"):
        built(name, min_ticks=5)
    weights, progress = run(built(name, min_ticks=3), states(6))
    assert not weights[:2].any()
    assert progress.ticks.min() >= 3


def test_geometric_weights_and_divergence_by_hand():
    policy = Geometric(D, 4, 1, tau=0.999, prior=2.0, price=3.0).double()
    with torch.no_grad():
        policy.bias.fill_(math.log(0.3 / 0.7))
    weights, _ = run(policy, states(5))
    q = [0.3, 0.21, 0.147, 0.343]
    torch.testing.assert_close(weights[:, 0, 0], torch.tensor(q, dtype=WIDE))
    g = [0.5 ** (k + 1) for k in range(4)]
    divergence = sum(a * math.log(a / (b / sum(g))) for a, b in zip(q, g, strict=True))
    assert policy.charge(list(weights), 4)[0, 0].item() == pytest.approx(3 * divergence)


def test_the_prior_pulls_to_a_depth_from_both_sides():
    slopes = []
    for share in (0.05, 0.9):
        policy = Geometric(D, 8, 1, tau=0.999, prior=3.0, price=1.0).double()
        with torch.no_grad():
            policy.bias.fill_(math.log(share / (1 - share)))
        policy.charge(list(run(policy, states(9))[0]), 8).sum().backward()
        slopes.append(policy.bias.grad.item())
    assert slopes[0] < 0 < slopes[1]  # rarely stopping is raised, stopping at once lowered


def test_the_divergence_is_finite_where_nothing_is_left():
    policy = built("ponder", tau=0.5)
    with torch.no_grad():
        policy.bias.fill_(40.0)
    charge = policy.charge(list(run(policy, states(6))[0]), 5)
    charge.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in policy.parameters())


def test_convergence_stops_where_the_state_rests():
    moving = [torch.full((1, 2, D), 0.0, dtype=WIDE)]
    for k in range(1, 6):
        step = torch.tensor([0.5**k, 1.0], dtype=WIDE)[None, :, None]  # one place settles, one does not
        moving.append(moving[-1] + step)
    _, progress = run(Convergence(1, 0.1), moving)
    assert progress.ticks.tolist() == [[4, 5]]  # 1/16 of 15/16 is below a tenth, 1/8 of 7/8 is not


def test_the_controllers_exits_are_distributed_as_its_hazards_say():
    policy, places = built("controller"), 20000
    one = [state[:1, :1].expand(1, places, D) for state in states(6)]
    luck = torch.rand(1, places, generator=torch.Generator().manual_seed(0), dtype=WIDE)
    found = run(policy, one, luck)[0].mean((1, 2))
    left, want = 1.0, []
    for k in range(1, 6):
        share = 1.0 if k == 5 else policy.hazard(one[k][:, :1], one[k - 1][:, :1], policy.bias[k - 1], WIDE).item()
        want.append(left * share)
        left *= 1 - share
    torch.testing.assert_close(found, torch.tensor(want, dtype=WIDE), atol=0.012, rtol=0)
    median = next(k for k in range(5) if sum(want[: k + 1]) >= 0.5)
    assert run(policy, one)[0][:, 0, 0].argmax().item() == median  # without luck


def test_the_lesson_has_the_slope_of_the_expected_reward():
    """Against central differences of -sum_k q_k R_k; the baseline must take nothing from it."""
    policy, seen = built("controller", price=0.3), states(6, places=3)
    nll = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(4), dtype=WIDE)

    def cost():
        left, total = torch.ones(2, 3, dtype=WIDE), 0.0
        for k in range(1, 6):
            hazard = policy.hazard(seen[k], seen[k - 1], policy.bias[min(k, 4) - 1], WIDE)
            share = left if k == 5 else hazard * left
            total = total + (share * (nll[k - 1] + 0.3 * k)).sum()
            left = left - share
        return total

    policy.lesson(seen, nll).sum().backward()
    for parameter in policy.parameters():
        flat, place = parameter.data.view(-1), 0
        size = 1e-5
        flat[place] += size
        up = cost()
        flat[place] -= 2 * size
        down = cost()
        flat[place] += size
        assert parameter.grad.view(-1)[place].item() == pytest.approx(((up - down) / (2 * size)).item(), rel=1e-5)


def test_the_reward_trains_the_controller_alone():
    policy = built("controller")
    seen = [state.requires_grad_() for state in states(6, places=3)]
    nll = torch.rand(5, 2, 3, dtype=WIDE).requires_grad_()
    lesson = policy.lesson(seen, nll).sum()
    assert torch.autograd.grad(lesson, [*seen, nll], retain_graph=True, allow_unused=True) == (None,) * 7
    assert all(bool(slope.any()) for slope in torch.autograd.grad(lesson, list(policy.parameters())))


def test_a_controller_learns_where_to_stop():
    """Places of two kinds, told by a channel: one is best left after tick 1, the other after tick 4."""
    policy, g = Controller(D, 5, 1, 8, 0.3), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), 0.03)
    late = torch.arange(40) % 2 == 1
    for _ in range(250):
        seen = [torch.randn(1, 40, D, generator=g) * 0.3 for _ in range(6)]
        for state in seen:
            state[..., 0] = torch.where(late, 3.0, -3.0)
        number = torch.arange(1, 6)[:, None, None]
        nll = torch.where(late & (number < 4), 2.0, 0.1)
        optimizer.zero_grad()
        policy.lesson(seen, nll).sum().backward()
        optimizer.step()
    running = policy.start(torch.ones(1, 40, dtype=torch.bool), torch.float32)
    for tick in range(1, 6):
        _, running = policy(seen[tick], seen[tick - 1], running, tick, 5)
    assert set(running.ticks[0][~late].tolist()) == {1}
    assert set(running.ticks[0][late].tolist()) == {4}


def test_decisions_are_in_float32_when_states_are_not():
    for name in ("ponder", "controller", "convergence"):
        policy = built(name).bfloat16()
        half = [state.bfloat16() for state in states(6)]
        running = policy.start(torch.ones(2, 50, dtype=torch.bool), torch.bfloat16)
        total = 0
        for tick in range(1, 6):
            weight, running = policy(half[tick], half[tick - 1], running, tick, 5)
            assert weight.dtype == torch.float32
            total = total + weight
        torch.testing.assert_close(total, torch.ones(2, 50), rtol=0, atol=1e-6)


def test_a_new_policy_needs_one_method():
    class Second(Halting):
        mixes = False

        def decide(self, new_BND, old_BND, before: Progress):
            return torch.zeros_like(before.offer), before.ticks >= 1

    assert run(Second(1), states(6))[1].ticks.unique().tolist() == [2]
