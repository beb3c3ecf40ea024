"""One step: the gradient of the mean loss, clipped once, or a refusal."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from stepladder.data.stream import Stream
from stepladder.models.base import IGNORE
from stepladder.models.noise import row_keys
from stepladder.train.optim import adamw
from stepladder.train.session import build
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
