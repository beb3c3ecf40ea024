"""Learning rate and AdamW: values, groups, and a state that goes out and comes back bit by bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.run import TrainConfig
from stepladder.train.optim import adamw, learning_rate, never_updated, optimizer_tensors, restore_optimizer
from stepladder.train.session import build


def config(**fields) -> TrainConfig:
    return TrainConfig.model_validate({"steps": 100, "lr": 1.0, "min_lr": 0.1, "warmup": 0.1, **fields})


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("cosine", {0.05: 0.5, 0.1: 1.0, 0.55: 0.55, 1.0: 0.1, 1.7: 0.1}),
        ("wsd", {0.05: 0.5, 0.1: 1.0, 0.8: 1.0, 0.9: 0.55, 1.0: 0.1, 1.7: 0.1}),
        ("constant", {0.05: 0.5, 0.1: 1.0, 0.9: 1.0, 1.0: 1.0, 1.7: 1.0}),
    ],
)
def test_schedules_have_the_documented_values(schedule, values):
    for progress, expected in values.items():
        assert learning_rate(config(schedule=schedule), progress) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(
    "fields", [{}, {"warmup": 0.0}, {"warmup": 0.9, "decay": 0.5}, {"decay": 1.0}, {"min_lr": 0.0}]
)
def test_schedules_have_no_jumps_and_rise_and_fall_once(schedule, fields):
    train = config(schedule=schedule, **fields)
    rates = [learning_rate(train, step / 1000) for step in range(1001)]
    assert max(abs(after - before) for before, after in itertools.pairwise(rates)) < 0.02
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_norms_and_embeddings_do_not(tiny, tied):
    run = tiny(model={"positions": "learned", "tied": tied})
    model = build(run, 20)
    decaying, kept = adamw(model, run.train).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("norm" not in names[id(p)] and "embed" not in names[id(p)] for p in decaying["params"])
    assert {names[id(p)] for p in kept["params"]} >= {"embed.tokens.weight", "embed.positions.weight", "norm.weight"}
    assert ("head.own.weight" in {names[id(p)] for p in decaying["params"]}) is not tied
    assert decaying["weight_decay"] == run.train.weight_decay
    assert kept["weight_decay"] == 0.0
    assert len(decaying["params"]) + len(kept["params"]) == len(names)


def test_it_is_adamw(tiny):
    """Three updates against the formulas of the paper, in float64."""
    run = tiny(weight_decay=0.5, beta1=0.9, beta2=0.98)
    model = build(run, 20)
    optimizer = adamw(model, run.train)
    weight = model.core.core.parts[0].part.project.weight
    value, first, second = weight.detach().double(), 0.0, 0.0
    torch.manual_seed(0)
    for t in (1, 2, 3):
        gradient = torch.randn_like(weight)
        weight.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = 0.01
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.98 * second + 0.02 * gradient.double() ** 2
        value = value * (1 - 0.01 * 0.5)
        value = value - 0.01 * (first / (1 - 0.9**t)) / ((second / (1 - 0.98**t)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach().double(), value, rtol=1e-5, atol=1e-6)


def step_all(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_state_survives_bit_by_bit_and_goes_on_equally(tiny):
    run = tiny()
    one, two = build(run, 20), build(run, 20)
    first, second = adamw(one, run.train), adamw(two, run.train)
    for seed in range(3):
        step_all(one, first, seed)
    two.load_state_dict(one.state_dict())
    restore_optimizer(two, second, {name: tensor.clone() for name, tensor in optimizer_tensors(one, first).items()})
    for seed in range(3, 6):
        step_all(one, first, seed)
        step_all(two, second, seed)
    for mine, theirs in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_foreign_state_is_refused_by_name(tiny):
    run = tiny()
    model = build(run, 20)
    optimizer = adamw(model, run.train)
    for name, tensor in (("nobody/exp_avg", torch.zeros(3)), ("norm.weight/exp_avg", torch.zeros(3))):
        with pytest.raises(UserError, match=name):
            restore_optimizer(model, optimizer, {name: tensor})


def test_never_updated_names_parameters_without_or_with_zero_gradients_only(tiny):
    run = tiny()
    model = build(run, 20)
    optimizer = adamw(model, run.train)
    names = [name for name, _ in model.named_parameters()]
    parameters = dict(model.named_parameters())
    for name in names[1:]:
        parameters[name].grad = torch.ones_like(parameters[name])
    parameters[names[2]].grad.zero_()
    optimizer.step()
    assert never_updated(model, optimizer) == [names[0], names[2]]
    parameters[names[2]].grad[..., 0] = 1e-30  # too small to square in float32, and still a gradient
    optimizer.step()
    assert never_updated(model, optimizer) == [names[0]]


def test_warm_up_begins_above_zero_in_a_run_of_steps():
    train = config()
    assert learning_rate(train, 1 / 100) == pytest.approx(0.1)
    assert not math.isclose(learning_rate(train, 1 / 100), 0.0)
