"""Planners in training: weights that warm up, and what a run without any planner term is."""

from __future__ import annotations

import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.core.files import read_lines
from stepladder.models.heads.plan_losses import NAMES
from stepladder.run import TrainConfig
from stepladder.train.session import train


def test_a_weight_rises_in_a_line_and_stays():
    plan = TrainConfig(steps=9, losses={"usage": 2.0, "ponder": 3.0}, losses_warmup={"usage": 4, "plan_mi": 2})
    assert [plan.at(step).losses["usage"] for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert [plan.at(step).losses["plan_mi"] for step in range(3)] == [0.5, 1.0, 1.0]
    assert plan.at(0).losses["ponder"] == 3.0
    assert plan.losses == {"usage": 2.0, "ponder": 3.0}
    plain = TrainConfig(steps=9)
    assert plain.at(3) is plain


def test_warm_up_reaches_the_gradient(tiny, tmp_path):
    """The first step with a long warm-up is nearly the first step without the term; later ones are not."""
    ways = {"none": {"losses": {"usage": 0.0}}, "long": {"losses_warmup": {"usage": 10**9}}, "all": {}}
    model = {**dict.fromkeys(NAMES, 0.0), "usage": 50.0}
    last = {}
    for name, fields in ways.items():
        home = train(tiny(name, "apelr_v2", model, steps=8, log_every=1, **fields), tmp_path, quiet=True)
        last[name] = [line["loss"] for line in read_lines(home / "metrics.jsonl") if line.get("loss")]
    assert last["long"] == pytest.approx(last["none"], abs=1e-4)
    assert last["all"] != pytest.approx(last["none"], abs=1e-4)


def test_a_name_that_no_loss_has_is_refused(tiny, tmp_path):
    fields = {"losses_warmup": {"usaeg": 4}}
    with pytest.raises(UserError, match="no loss 'usaeg'"):
        train(tiny("run", "apelr_v2", {"usage": 0.1}, **fields), tmp_path, quiet=True)


@pytest.mark.parametrize("kind", ["apelr_v1", "apelr_v2"])
def test_without_planner_terms_a_run_trains_the_planner_by_its_likelihood(kind, tiny, tmp_path):
    """The likelihood alone reaches prior, transition and context: terms are no condition, as they were upstream."""
    quiet = dict.fromkeys(NAMES, 0.0)
    run = tiny("run", kind, quiet, steps=40, batch=16, lr=1e-2, log_every=10)
    torch.manual_seed(0)
    home = train(run, tmp_path, quiet=True)
    lines = [line for line in read_lines(home / "metrics.jsonl") if line.get("loss")]
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"]
    assert all(line["losses"] == {} for line in lines)
    assert not any(line.get("event") for line in read_lines(home / "metrics.jsonl"))  # "no_gradient" would be one
