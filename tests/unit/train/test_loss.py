"""The objective: sums over scored tokens, weights by name, nothing from unscored positions."""

from __future__ import annotations

import math

import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.models.base import IGNORE, Output
from stepladder.train.loss import objective

TARGETS = torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, 0]])


def output(**losses: torch.Tensor) -> Output:
    nll = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 4.0]], requires_grad=True)
    return Output(None, nll, None, losses, {})


def test_terms_are_summed_over_scored_tokens_and_weighed_by_name():
    ponder = torch.tensor([[1.0, 50.0, 1.0], [50.0, 50.0, 2.0]])
    balance = torch.ones(2, 3)
    total, sums = objective(output(ponder=ponder, balance=balance), TARGETS, {"ponder": 0.5})
    assert {name: float(value) for name, value in sums.items()} == {"nll": 7.0, "ponder": 4.0, "balance": 3.0}
    assert float(total.detach()) == 7.0 + 0.5 * 4.0 + 3.0


def test_a_nan_where_nothing_is_asked_does_not_count():
    value = torch.tensor([[1.0, math.nan, 1.0], [math.inf, math.nan, 1.0]], requires_grad=True)
    total, _ = objective(output(ponder=value), TARGETS, {})
    assert float(total.detach()) == 10.0
    total.backward()
    assert value.grad.tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]


def test_sums_are_cut_from_the_graph():
    total, sums = objective(output(), TARGETS, {})
    assert total.requires_grad
    assert not any(value.requires_grad for value in sums.values())


@pytest.mark.parametrize(("losses", "told"), [({"ponder": torch.ones(2, 3)}, "did you mean 'ponder'"), ({}, "none")])
def test_a_weight_for_a_loss_that_is_not_there_is_refused(losses, told):
    with pytest.raises(UserError, match=rf"train.losses: the model has no loss 'pondre'.*{told}"):
        objective(output(**losses), TARGETS, {"pondre": 1.0})
