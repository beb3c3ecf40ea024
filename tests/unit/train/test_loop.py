"""The loop's plain objects: budgets, progress, metric lines; and that it stays one screen."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math

import pytest

from stepladder.run import TrainConfig
from stepladder.train.loop import MEMORY, SETTLED, Budget, Progress, _spike, fit
from stepladder.train.step import Taken


def budget(**fields) -> Budget:
    return Budget.of(TrainConfig.model_validate(fields), tokens_per_step=2048, flops_per_token=1e6)


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 20480}, 10),
        ({"tokens": 21000}, 10),
        ({"tokens": 1}, 1),
        ({"flops": 2048e7}, 10),
        ({"flops": 1.0}, 1),
    ],
)
def test_budgets_become_the_nearest_number_of_steps(fields, steps):
    found = budget(**fields)
    assert found.steps == found.horizon == steps
    assert not found.spent(Progress(step=steps - 1))
    assert found.spent(Progress(step=steps))
    assert found.fraction(Progress(step=steps - 1)) == 1.0
    assert found.fraction(Progress(step=0)) == pytest.approx(1 / steps)


def test_a_budget_in_seconds_counts_seconds():
    found = budget(seconds=10.0)
    assert found.steps is None
    assert not found.spent(Progress(step=10**6, seconds=9.9))
    assert found.spent(Progress(step=1, seconds=10.0))
    assert found.fraction(Progress(seconds=2.5)) == 0.25


def test_an_extended_budget_stays_at_the_end_of_its_schedule():
    found = dataclasses.replace(budget(steps=20), horizon=10)
    assert [found.fraction(Progress(step=step)) for step in (4, 9, 15)] == [0.5, 1.0, 1.0]


def test_progress_is_plain_data_and_comes_back_exactly():
    progress = Progress()
    progress.count(Taken(3, {"nll": 0.1 + 0.2, "ponder": 1 / 3}), 64, 1e5 / 3, 0.1)
    progress.count(Taken(2, {"nll": 0.7}, refused="a spike"), 64, 1e5 / 3, 0.2)
    again = Progress(**json.loads(json.dumps(dataclasses.asdict(progress))))
    assert again == progress
    assert (again.step, again.updates, again.skips_in_row, again.tokens, again.supervised) == (2, 1, 1, 128, 5)


def test_metric_lines_hold_token_weighted_means_of_updates_since_the_last_line():
    progress = Progress()
    progress.count(Taken(1, {"nll": 4.0, "ponder": 1.0}), 10, 2.0, 1.0)
    progress.count(Taken(3, {"nll": 2.0, "ponder": 0.0}), 10, 2.0, 1.0)
    progress.count(Taken(9, {"nll": 900.0, "ponder": 9.0}, refused="a spike"), 10, 2.0, 2.0)
    assert progress.close_window(lr=0.5, grad_norm=0.25) == {
        "step": 3,
        "tokens": 30,
        "supervised": 13,
        "loss": 1.5,
        "lr": 0.5,
        "grad_norm": 0.25,
        "seconds": 4.0,
        "tokens_per_s": 7.5,
        "flops": 60.0,
        "losses": {"ponder": 0.25},
        "event": None,
    }
    progress.count(Taken(0, refused="no supervised token in the batch"), 10, 2.0, 1.0)
    empty = progress.close_window(lr=0.5, grad_norm=math.nan)
    assert (empty["loss"], empty["losses"], empty["grad_norm"], empty["tokens_per_s"]) == (None, {}, None, 10.0)
    watched = progress.close_window(lr=0.5, grad_norm=1.0, grad_norms={"halting": 0.5, "odd": math.inf})
    assert watched["grad_norms"] == {"halting": 0.5, "odd": None}


def test_the_running_mean_forgets_and_spikes_are_judged_once_it_has_settled():
    progress = Progress()
    for _ in range(SETTLED - 1):
        progress.count(Taken(1, {"nll": 2.0}), 1, 0.0, 0.0)
    assert _spike(progress, 3.0) == math.inf
    progress.count(Taken(1, {"nll": 2.0}), 1, 0.0, 0.0)
    assert _spike(progress, 3.0) == pytest.approx(6.0)
    assert _spike(progress, None) == math.inf
    for _ in range(10 * MEMORY):
        progress.count(Taken(1, {"nll": 1.0}), 1, 0.0, 0.0)
    assert progress.mean == pytest.approx(1.0, abs=1e-3)


def test_fit_is_one_screen():
    assert len(inspect.getsource(fit).splitlines()) <= 60
