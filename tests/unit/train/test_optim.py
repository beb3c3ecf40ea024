"""Learning rate and AdamW: values, groups, and a state that goes out and comes back bit by bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.core.files import read_lines
from stepladder.models.zoo import ARCHITECTURES
from stepladder.run import Run, TrainConfig
from stepladder.train.optim import (
    adamw,
    hidden_matrices,
    learning_rate,
    never_updated,
    optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_rate,
)
from stepladder.train.session import build
from stepladder.train.session import train as train_run


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


# Muon ---------------------------------------------------------------------------------------------------------------


def seeing(run, vocab=20):
    """The model of a run, with an image encoder."""
    return build(Run.of({**run.tree(), "encoder": {"kind": "conv", "side": 8, "hidden": 8}}), vocab)


@pytest.mark.parametrize("kind", ARCHITECTURES.names())
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group_and_muon_has_hidden_matrices_only(tiny, kind, tied):
    several_heads = kind.startswith("apelr")  # which no one embedding can be
    can = "tied" in ARCHITECTURES.get(kind).model_fields and not several_heads
    run = tiny(kind=kind, model={"tied": tied} if can else {})
    model = seeing(run)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer(model, config(optimizer="muon")).param_groups
    found = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(found) == sorted(names.values())
    muon = [names[id(p)] for p in groups[0]["params"]]
    assert muon
    assert all(p.ndim == 2 and min(p.shape) > 1 for p in groups[0]["params"])
    assert not any(name.startswith(("embed.", "head.", "vision.")) for name in muon)
    tables = ("initial_ZD", "memory_NM", "first_MD", "start_QN", "conv")
    assert not any(name.endswith(tables) for name in muon)


def test_a_trainable_matrix_of_a_block_is_muons(tiny):
    model = seeing(tiny())
    names = {name for name, p in model.named_parameters() if any(p is each for each in hidden_matrices(model))}
    assert names == {n for n, p in model.named_parameters() if n.startswith("core.") and p.ndim == 2}
    model.core.requires_grad_(False)
    assert hidden_matrices(model) == []
    with pytest.raises(UserError, match="hidden matrices and this model has none"):
        optimizer(model, config(optimizer="muon"))


def test_it_is_torchs_muon_beside_adamw_to_the_bit(tiny):
    """Ours against torch.optim.Muon and torch.optim.AdamW put together by hand, with a changing rate."""
    run = tiny()
    one, two = seeing(run), seeing(run)
    train = config(optimizer="muon", lr=0.004, muon_lr=0.03, weight_decay=0.2, beta1=0.9, beta2=0.95)
    ours = optimizer(one, train)
    mine = hidden_matrices(two)
    rest = [p for p in two.parameters() if all(p is not m for m in mine)]
    tables = {two.embed.tokens.weight, two.vision.places.weight}
    muon = torch.optim.Muon(mine, lr=0.03, weight_decay=0.2)
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim > 1 and p not in tables], "weight_decay": 0.2},
            {"params": [p for p in rest if p.ndim < 2 or p in tables], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    for seed, fraction in enumerate((1.0, 0.5, 0.25)):
        set_rate(ours, 0.004 * fraction)
        for group in muon.param_groups:
            group["lr"] = 0.03 * fraction
        for group in adam.param_groups:
            group["lr"] = 0.004 * fraction
        step_all(one, ours, seed)
        step_all(two, muon, seed)
        adam.step()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_update_of_muon_is_the_formula(tiny):
    """Two updates against Nesterov momentum and five Newton-Schulz iterations, in float64."""
    model = seeing(tiny())
    ours = optimizer(model, config(optimizer="muon", lr=1.0, muon_lr=0.1, weight_decay=0.5))
    weight = max(hidden_matrices(model), key=lambda p: p.shape[0] / p.shape[1])
    rows, columns = weight.shape
    assert rows > columns
    value, momentum = weight.detach().double(), 0.0
    for seed in range(2):
        before = weight.detach().double()
        step_all(model, ours, seed)
        gradient = weight.grad.double()
        momentum = 0.95 * momentum + 0.05 * gradient
        x = 0.05 * gradient + 0.95 * momentum
        x = x.T / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        wanted = -0.1 * math.sqrt(rows / columns) * x.T
        value = weight.detach().double() - before * (1 - 0.1 * 0.5)
        assert (value - wanted).norm() / wanted.norm() < 0.03  # the iterations are in bfloat16
        singular = torch.linalg.svdvals(value) / (0.1 * math.sqrt(rows / columns))
        assert 0.5 < singular.min() < singular.max() < 1.3


def test_muon_needs_no_process_group(tiny):
    assert not torch.distributed.is_initialized()
    model = seeing(tiny())
    step_all(model, optimizer(model, config(optimizer="muon")), 0)
    assert not torch.distributed.is_initialized()


def test_muons_state_survives_bit_by_bit(tiny):
    run, train = tiny(), config(optimizer="muon", lr=0.01)
    one, two = seeing(run), seeing(run)
    first, second = optimizer(one, train), optimizer(two, train)
    for seed in range(3):
        step_all(one, first, seed)
    assert never_updated(one, first) == []
    two.load_state_dict(one.state_dict())
    kept = {name: tensor.clone() for name, tensor in optimizer_tensors(one, first).items()}
    assert {name.rpartition("/")[2] for name in kept} == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    restore_optimizer(two, second, kept)
    for seed in range(3, 6):
        step_all(one, first, seed)
        step_all(two, second, seed)
    for mine, theirs in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_muons_rate_follows_the_schedule(tiny):
    groups = optimizer(seeing(tiny()), config(optimizer="muon", lr=0.004)).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.02, 0.004, 0.004])


def test_muon_trains(tiny, tmp_path):
    folder = train_run(tiny(name="muon", optimizer="muon", steps=60, batch=8), tmp_path)
    lines = [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
    assert lines[-1] < 0.85 * lines[0]


def test_muons_rate_without_muon_is_refused():
    with pytest.raises(ValueError, match=r"muon_lr=0\.1 is for Muon"):
        config(muon_lr=0.1)
