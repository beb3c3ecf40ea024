"""Rows at a time: the most that fit, kept with the run, fewer after a step that ran out of memory.

What a step is does not depend on memory. ``train.batch`` is what the run says; ``micro: auto`` chooses the micro-batch.
"""

from pathlib import Path

import pytest
import torch

from stepladder.core.config import chosen
from stepladder.core.errors import UserError
from stepladder.core.files import read_json, read_lines, write_json
from stepladder.data.shards import learn
from stepladder.data.tasks import TASKS
from stepladder.data.tokenizers import AlphabetConfig
from stepladder.models.weights import weights_digest
from stepladder.run import Run, load
from stepladder.train import loop, session
from stepladder.train import micro as module
from stepladder.train.memory import training
from stepladder.train.micro import GIB, Micro, available, choose
from stepladder.train.session import torch_settings, train
from stepladder.train.step import OutOfMemory, gradient_step

CPU = torch.device("cpu")
VOCAB = learn(AlphabetConfig(), "".join(sorted(chosen(TASKS, "task")("copy").alphabet)), [], Path()).vocab


def peak(run, rows):
    """Bytes of a step of ``run`` with so many rows at a time."""
    given = run.train.model_copy(update={"micro": rows})
    return training(run.model, VOCAB, min(run.train.batch, 2 * rows), run.data.sequence, given).peak


def weights(home):
    return weights_digest(load(home, device="cpu").model)


@pytest.fixture
def roomy(tiny):
    """``roomy(rows, name)``: a run of 12 rows, with memory for so many rows at a time and hardly more."""

    def make(rows, name="run", **fields):
        bare = tiny(name, batch=12, micro="auto", **fields)
        tree = bare.tree()
        tree["train"]["memory"] = (peak(bare, rows) + 1000) / GIB
        return Run.of(tree)

    return make


@pytest.mark.parametrize("rows", [3, 12])
def test_the_largest_divisor_that_fits(roomy, rows):
    run = roomy(rows)
    chosen = choose(run, VOCAB, CPU)
    assert chosen["rows"] == rows
    assert chosen["peak_bytes"] == peak(run, rows) <= chosen["room_bytes"]
    assert rows == 12 or peak(run, rows + 1) > chosen["room_bytes"]
    assert chosen == choose(run, VOCAB, CPU)


def test_unless_told_a_share_of_what_is_free(tiny, monkeypatch):
    run = tiny(batch=12, micro="auto")
    monkeypatch.setattr(module, "available", lambda device: 2 * peak(run, 4) + 2000)
    assert choose(run, VOCAB, CPU)["rows"] == 4
    monkeypatch.setattr(module, "available", lambda device: 0)
    with pytest.raises(UserError, match=r"with a single row at a time, and there are 0 .*recompute"):
        choose(run, VOCAB, CPU)


def test_what_is_free_is_less_than_all():
    assert 1 << 20 < available(CPU) < 1 << 50


def test_a_choice_is_kept_and_is_the_same_as_giving_the_number(roomy, tiny, tmp_path):
    home = train(roomy(3), tmp_path, quiet=True)
    (choice,) = read_json(home / "micro.json")["choices"]
    assert (choice["step"], choice["rows"]) == (0, 3)
    assert choice["why"].startswith("train.memory=")
    given = train(tiny("given", batch=12, micro=3), tmp_path, quiet=True)
    assert weights(home) == weights(given)
    assert not (given / "micro.json").exists()


def test_a_run_that_goes_on_has_the_rows_it_had(roomy, tmp_path, monkeypatch):
    whole = train(roomy(3, "whole"), tmp_path, quiet=True)
    run, steps = roomy(3, save_every=2), []

    def broken(*args, **kwargs):
        steps.append(0)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return gradient_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "gradient_step", broken)
        with pytest.raises(KeyboardInterrupt):
            train(run, tmp_path, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(module, "choose", lambda *_: pytest.fail("chosen again"))
        home = train(run, tmp_path, quiet=True)
    assert weights(home) == weights(whole)


def test_another_device_is_measured_anew(roomy, tmp_path):
    run = roomy(3)
    write_json(tmp_path / "micro.json", {"choices": [{"step": 0, "rows": 12, "why": "", "device": "a large one"}]})
    micro = Micro.of(run, VOCAB, tmp_path, CPU)
    micro.keep(tmp_path, 7)
    assert [micro.at(step).micro for step in (0, 6, 7, 100)] == [12, 12, 3, 3]
    assert [entry["step"] for entry in read_json(tmp_path / "micro.json")["choices"]] == [0, 7]
    again = Micro.of(run, VOCAB, tmp_path, CPU)
    assert again.choices == micro.choices


def short_of_memory(rows, after):
    """A stand-in for ``gradient_step`` for which, from call ``after`` on, more than ``rows`` at a time do not fit."""
    calls = []

    def step(model, optimizer, batch, train, **options):
        calls.append(train.at_once(len(batch.tokens)))
        if len(calls) > after and calls[-1] > rows:
            raise OutOfMemory("no more of it")
        return gradient_step(model, optimizer, batch, train, **options)

    return step, calls


def test_a_step_that_runs_out_of_memory_is_begun_anew_with_fewer_rows(roomy, tmp_path, monkeypatch):
    step, calls = short_of_memory(2, after=3)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "gradient_step", step)
        home = train(roomy(6, log_every=1), tmp_path, quiet=True)
    assert calls == [6, 6, 6, 6, 4, 3, 2, 2, 2]
    events = [line for line in read_lines(home / "metrics.jsonl") if line.get("event")]
    assert [(line["step"], line["event"], line["rows"]) for line in events] == [
        (4, "fewer rows at a time", rows) for rows in (4, 3, 2)
    ]
    assert [(c["step"], c["rows"]) for c in read_json(home / "micro.json")["choices"]] == [(0, 6), (3, 2)]
    assert read_json(home / "summary.json")["updates"] == 6


def test_a_number_that_was_given_is_not_changed(tiny, tmp_path, monkeypatch):
    step, _ = short_of_memory(2, after=4)
    monkeypatch.setattr(loop, "gradient_step", step)
    with pytest.raises(UserError, match=r"step 5 ran out of memory with 4 rows at a time \(no more of it\).*micro=2, "):
        train(tiny(save_every=2), tmp_path, quiet=True)
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "failed"
    assert load(tmp_path / "run", device="cpu").step == 4
    with pytest.raises(UserError, match=r"make data.sequence shorter, or set train.recompute"):
        Micro(tiny(micro=1).train, []).shrink(0, "none")


def test_another_error_is_left_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "_rehearse", lambda *_: None)
    monkeypatch.setattr(loop, "gradient_step", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(tiny(micro="auto"), tmp_path, quiet=True)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"batch": "auto"}, "the rows of a step decide its result.*micro: auto"),
        ({"micro": 0}, "micro"),
        ({"micro": "most"}, "auto"),
        ({"micro": 3}, "micro=3 does not divide batch=4"),
        ({"memory": 2}, "memory=2 is for micro: auto"),
        ({"micro": "auto", "memory": 0}, "memory"),
        ({"matmul": "low"}, "matmul"),
    ],
)
def test_what_cannot_be_asked_for(tiny, fields, told):
    with pytest.raises(UserError, match=told):
        tiny(**fields)


def test_images_are_not_measured(tiny):
    tree = tiny(micro="auto").tree()
    with pytest.raises(UserError, match="does not measure image encoders"):
        Run.of({**tree, "encoder": {"kind": "conv", "side": 28}})


def test_products_have_the_precision_asked_for_and_then_their_own(tiny):
    def now():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = now()
    for matmul in ("highest", "high", "medium"):
        for tf32 in (False, True):
            with torch_settings(tiny(matmul=matmul, tf32=tf32).train, CPU):
                assert now() == (matmul, tf32)
    with pytest.raises(ZeroDivisionError), torch_settings(tiny(matmul="medium").train, CPU):
        _ = 1 / 0
    assert now() == before
