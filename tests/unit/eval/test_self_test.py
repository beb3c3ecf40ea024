"""The self-test passes on what is sound, and each check catches the fault that it is there for."""

import dataclasses

import pytest
import torch

from stepladder.data.base import TASKS, Task
from stepladder.eval import exact
from stepladder.eval.exact import sheets
from stepladder.eval.self_test import (
    alone,
    cached,
    causal,
    constant,
    oracle,
    padding,
    repeat,
    self_test,
    shuffled,
    table,
    uniform,
)
from stepladder.eval.suite import Job, evaluate


def job(loaded):
    return Job(loaded.model, loaded.tokenizer, loaded.run, loaded.run.eval)


@pytest.mark.parametrize("model", ["transformer", "shared_loop", "identity"])
def test_a_sound_model_passes(make, model):
    with torch.no_grad():
        outcome = self_test(job(make(model=model)))
    assert outcome.status == "passed", [check for check in outcome.body["checks"] if not check["passed"]]
    assert len(outcome.body["checks"]) == 2 * 4 + 5
    assert table({**outcome.body, "status": "passed"}).row_count == 13


@pytest.mark.parametrize("name", TASKS.names())
def test_scripted_models_score_what_they_are_worth_on_every_task(make, name):
    loaded = make([{"kind": "task", "task": name}])
    run = loaded.run
    (sheet,) = sheets(run, 5, 12)
    for check in (oracle, constant, uniform, shuffled):
        passed, detail = check(sheet, job(loaded))
        assert passed, (check.__name__, detail)


def test_a_failed_check_fails_the_suite(make, monkeypatch):
    monkeypatch.setattr(TASKS.get("addition"), "solve", lambda self, question: "7")
    loaded = make()
    (results,) = evaluate(loaded, ["self_test"], quiet=True)
    assert results["status"] == "failed"
    failed = {check["name"] for check in results["checks"] if not check["passed"]}
    assert "oracle/addition" in failed
    assert "oracle/parity" not in failed


def test_lax_scoring_is_caught(make, monkeypatch):
    loaded = make()
    sheet = sheets(loaded.run, 5, 20)[1]
    record = exact._record

    def lax(task, item, generation, tokenizer):
        found = record(task, item, generation, tokenizer)
        return {**found, "correct": found["output"][:1] == found["answer"][:1]}

    monkeypatch.setattr(exact, "_record", lax)
    assert oracle(sheet, job(loaded))[0]
    assert not constant(sheet, job(loaded))[0]
    assert not shuffled(sheet, job(loaded))[0]


def test_a_wrong_statement_of_chance_is_caught(make, monkeypatch):
    loaded = make()
    sheet = sheets(loaded.run, 5, 20)[0]
    assert uniform(sheet, job(loaded))[0]
    monkeypatch.setattr(TASKS.get("parity"), "chance", lambda self, size: 0.6)
    passed, detail = uniform(sheet, job(loaded))
    assert not passed
    assert "0.6" in detail


def hooked(loaded, change):
    """The same model with its logits changed by change(logits, tokens, options)."""
    loaded.model.register_forward_hook(
        lambda _, inputs, options, out: dataclasses.replace(out, logits=change(out.logits, inputs[0], options)),
        with_kwargs=True,
    )
    return job(loaded)


def test_a_model_that_draws_from_the_global_generator_is_caught(make):
    assert repeat(job(make()))[0]
    noisy = hooked(make(), lambda logits, *_: logits + torch.randn_like(logits))
    assert not repeat(noisy)[0]


def test_a_model_that_counts_its_chunk_is_caught(make):
    def tilt(logits, tokens, options):
        return logits + torch.arange(logits.shape[-1]) * (tokens.shape[1] == 1)

    assert not cached(hooked(make(), tilt))[0]


def test_a_model_that_sees_its_batch_mates_is_caught(make):
    def tilt(logits, tokens, options):
        return logits + torch.arange(logits.shape[-1]) * float(len(tokens) > 1)

    assert not alone(hooked(make(), tilt))[0]


def test_a_model_that_sees_the_future_is_caught(make):
    assert not causal(hooked(make(), lambda logits, tokens, _: logits + tokens[:, -1, None, None] * 1e-3))[0]


def test_a_model_that_sees_padding_is_caught(make):
    def tilt(logits, tokens, options):
        return logits + (tokens == 0).sum(1)[:, None, None]

    assert not padding(hooked(make(), tilt))[0]


def test_nan_fails_the_checks_on_logits(make):
    broken = hooked(make(), lambda logits, *_: logits * float("nan"))
    assert not causal(broken)[0]
    assert not padding(broken)[0]


def test_every_task_has_its_own_oracle():
    assert all(TASKS.get(name).solve is not Task.solve for name in TASKS.names())
