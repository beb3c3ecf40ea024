"""One step: the gradient of the mean loss, clipped once, or a refusal."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from stepladder.core.files import read_lines
from stepladder.data.stream import Stream
from stepladder.models.base import IGNORE, detach_state
from stepladder.models.halting import ACT
from stepladder.models.noise import row_keys
from stepladder.train.optim import adamw
from stepladder.train.session import build, train
from stepladder.train.step import gradient_step


@pytest.fixture
def setting(tiny, tmp_path):
    """(run, model, optimizer, batch), with noise in the model and no clipping in reach."""
    run = tiny(model={"dropout": 0.2}, clip=1e9, micro=2)
    stream = Stream(run.data, run.seed, tmp_path)
    model = build(run, stream.tokenizer.vocab)
    return run, model, adamw(model, run.train), stream.batch(0, np.arange(4), 4)


def test_the_gradient_is_that_of_the_mean_over_supervised_tokens(setting):
    run, model, optimizer, batch = setting
    tokens, targets, documents = (torch.from_numpy(a) for a in (batch.tokens, batch.targets, batch.documents))
    nll = model(tokens, targets=targets, documents=documents, key=row_keys(9, 4, torch.device("cpu"))).nll_BT
    mean = nll.sum() / (targets != IGNORE).sum()
    expected = torch.autograd.grad(mean, list(model.parameters()))
    taken = gradient_step(model, optimizer, batch, run.train, lr=0.0, noise=9)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert taken.loss == pytest.approx(float(mean.detach()), rel=1e-6)
    assert taken.supervised == int((batch.targets != IGNORE).sum())
    assert taken.grad_norm == pytest.approx(float(torch.cat([g.flatten() for g in expected]).norm()), rel=1e-4)


def test_noise_is_a_function_of_its_key(setting):
    run, model, optimizer, batch = setting
    losses = [gradient_step(model, optimizer, batch, run.train, lr=0.0, noise=noise).loss for noise in (1, 2, 1)]
    assert losses[0] == losses[2] != losses[1]


def test_the_norm_is_clipped_once_over_everything(setting):
    run, model, optimizer, batch = setting
    train = run.train.model_copy(update={"clip": 0.01})
    taken = gradient_step(model, optimizer, batch, train, lr=0.0, noise=9)
    norm = float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    assert taken.grad_norm > 0.1  # before clipping
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_the_rate_asked_for_is_the_rate_used(setting):
    run, model, optimizer, batch = setting
    before = [p.detach().clone() for p in model.parameters()]
    gradient_step(model, optimizer, batch, run.train, lr=0.0, noise=9)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    gradient_step(model, optimizer, batch, run.train, lr=1e-3, noise=9)
    moved = max(float((p.detach() - q).abs().max()) for p, q in zip(model.parameters(), before, strict=True))
    assert 5e-4 < moved < 2e-3  # Adam moves by about the rate


def test_a_loss_above_the_limit_is_refused(setting):
    run, model, optimizer, batch = setting
    before = [p.detach().clone() for p in model.parameters()]
    taken = gradient_step(model, optimizer, batch, run.train, lr=1.0, noise=9, limit=0.5)
    assert taken.refused.startswith("a spike: the loss of")
    assert math.isfinite(taken.loss)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


def test_a_named_loss_that_is_not_finite_is_named(setting, monkeypatch):
    run, model, optimizer, batch = setting
    real = model.forward

    def forward(*args, **kwargs):
        output = real(*args, **kwargs)
        return dataclasses.replace(output, losses={"ponder": torch.full_like(output.nll_BT, math.inf)})

    monkeypatch.setattr(model, "forward", forward)
    taken = gradient_step(model, optimizer, batch, run.train, lr=1.0, noise=9)
    assert taken.refused == "the loss is inf in ponder"
    assert taken.rows == []
    assert not optimizer.state


def stepped(run, tmp_path, change=lambda model: None):
    """(model, what one step did): the rate is 0, so the weights stay."""
    stream = Stream(run.data, run.seed, tmp_path)
    model = build(run, stream.tokenizer.vocab)
    change(model)
    return model, gradient_step(
        model, adamw(model, run.train), stream.batch(0, np.arange(4), 4), run.train, lr=0.0, noise=9
    )


def test_the_halting_heads_norm_is_that_of_its_own_gradient_before_clipping(tiny, tmp_path):
    run = tiny(kind="act", clip=1e-4)
    model, taken = stepped(run, tmp_path)
    policy = model.core.halting
    shrunk = float(torch.cat([p.grad.flatten() for p in policy.parameters()]).norm())
    assert taken.grad_norms == {"halting": pytest.approx(shrunk * taken.grad_norm / 1e-4, rel=1e-3)}
    assert 0 < taken.grad_norms["halting"] < taken.grad_norm


def test_models_without_a_policy_to_train_report_nothing(tiny, tmp_path):
    for kind in ("transformer", "latent"):  # a fixed number of ticks has no parameters
        assert stepped(tiny(kind=kind), tmp_path)[1].grad_norms == {}


def test_S7_a_detached_halting_head_shows_as_a_gradient_of_zero(tiny, tmp_path):
    """The ancestor's fault: the ponder term was a float, and what the head said weighed no output."""

    class Detached(ACT):
        def decide(self, new_BND, old_BND, before):
            offer, stop = super().decide(new_BND, old_BND, before)
            return offer.detach(), stop

    def detach(model):
        model.core.halting.__class__ = Detached

    run = tiny(kind="act")
    alive, dead = stepped(run, tmp_path)[1], stepped(run, tmp_path, detach)[1]
    assert alive.grad_norms["halting"] > 0
    assert dead.grad_norms == {"halting": 0.0}
    assert dead.grad_norm > 0  # all the rest learns, and no loss curve tells


def test_watching_costs_no_further_synchronisation(tiny, tmp_path, monkeypatch):
    seen = {}
    real = torch.Tensor.tolist
    for kind in ("latent", "act"):
        calls = []
        monkeypatch.setattr(torch.Tensor, "tolist", lambda self, calls=calls: calls.append(1) or real(self))
        stepped(tiny(kind=kind), tmp_path)
        seen[kind] = len(calls)
    assert seen["act"] == seen["latent"]


def test_metric_lines_have_the_norm_where_there_is_a_head(tiny, tmp_path):
    for kind in ("act", "transformer"):
        lines = read_lines(train(tiny(kind, kind), tmp_path, quiet=True) / "metrics.jsonl")
        found = [line.get("grad_norms") for line in lines if "loss" in line]
        assert len(found) == 3
        if kind == "act":
            assert all(0 < norms["halting"] < 10 for norms in found)
        else:
            assert found == [None] * 3


def _gradients(model, batch, train, optimizer):
    taken = gradient_step(model, optimizer, batch, train, lr=0.0, noise=9)
    return taken.loss, [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def recurrent(tiny, tmp_path):
    """(run, model, optimizer, batch) of a model whose state carries a gradient across all tokens."""
    run = tiny(kind="ssm", clip=1e9)
    stream = Stream(run.data, run.seed, tmp_path)
    model = build(run, stream.tokenizer.vocab).double()
    return run, model, adamw(model, run.train), stream.batch(0, np.arange(4), 4)


def test_a_horizon_leaves_the_loss_and_cuts_the_gradient(recurrent):
    run, model, optimizer, batch = recurrent
    length = batch.tokens.shape[1]
    found = {
        h: _gradients(model, batch, run.train.model_copy(update={"horizon": h}), optimizer)
        for h in (None, length, length + 5, 7, 1)
    }
    loss, whole = found[None]
    for horizon in (length, length + 5):
        assert found[horizon][0] == loss
        torch.testing.assert_close(found[horizon][1], whole, rtol=0, atol=0)
    for horizon in (7, 1):
        assert found[horizon][0] == pytest.approx(loss, rel=1e-9)
        distance = max(float((a - b).abs().max()) for a, b in zip(found[horizon][1], whole, strict=True))
        assert distance > 1e-4


def test_a_horizon_is_the_sum_over_chunks_with_the_state_as_a_constant(recurrent):
    run, model, optimizer, batch = recurrent
    tokens, targets, documents = (torch.from_numpy(a) for a in (batch.tokens, batch.targets, batch.documents))
    state, total = None, 0.0
    for chunk in range(0, tokens.shape[1], 9):
        place = slice(chunk, chunk + 9)
        key = row_keys(9, 4, torch.device("cpu")) if state is None else None
        output = model(tokens[:, place], state, targets=targets[:, place], documents=documents[:, place], key=key)
        total, state = total + output.nll_BT.sum(), detach_state(output.state)
    expected = torch.autograd.grad(total / (targets != IGNORE).sum(), list(model.parameters()))
    _, found = _gradients(model, batch, run.train.model_copy(update={"horizon": 9}), optimizer)
    torch.testing.assert_close(found, list(expected), rtol=1e-9, atol=1e-12)
