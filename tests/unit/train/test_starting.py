"""Fine-tuning: exactly the base's weights, step 0, a fresh optimizer, its own rate; strict whatever happens."""

from __future__ import annotations

import shutil

import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.core.files import read_json, read_lines
from stepladder.finetune import read
from stepladder.models.weights import load_tensors, weights_digest
from stepladder.run import Run, checkpoint_path, load
from stepladder.start import Adapters
from stepladder.train import session
from stepladder.train.session import train

LATER = [
    "data.sources=[{kind: task, task: reverse}]",
    "train.batch=4",
    "train.lr=0.01",
    "train.device=cpu",
    "train.log_every=1",
]
STAGES = [None, Adapters(rank=2), Adapters(rank=2, vocabulary=True)]


@pytest.fixture
def base(tmp_path, tiny):
    sources = [{"kind": "task", "task": "copy"}, {"kind": "task", "task": "reverse"}]
    tree = tiny("base", steps=8, lr=0.003).tree()
    run = Run.of({**tree, "data": {**tree["data"], "sources": sources}})
    return train(run, tmp_path, quiet=True)


def _later(base, stage, *overrides, **options):
    flags = {"tasks": "copy", "steps": 6, "text": None}
    return read(base, None, [*LATER, *overrides], flags, stage, **options)


@pytest.mark.parametrize("stage", STAGES, ids=["full", "adapters", "vocabulary"])
def test_it_begins_at_step_0_from_the_bases_weights(base, tmp_path, stage):
    run = _later(base, stage, name="later")
    assert run.name == "later"
    assert run.model == load(base).run.model
    home = train(run, tmp_path, quiet=True)
    summary, lines = read_json(home / "summary.json"), read_lines(home / "metrics.jsonl")
    assert (summary["steps"], summary["updates"]) == (6, 6)
    assert not [line for line in lines if line.get("event")]
    assert max(line["lr"] for line in lines) <= 0.01
    assert lines[0]["lr"] > 0.009  # its own rate, not the base's
    # Not what training from fresh weights would give, and from these weights: the first loss is the base's.
    plain = train(run.model_copy(update={"start": None, "name": "plain"}), tmp_path, quiet=True)
    assert read_lines(plain / "metrics.jsonl")[0]["loss"] != lines[0]["loss"]
    loaded = load(home)
    assert weights_digest(loaded.model) != weights_digest(load(base).model)
    assert set(dict(loaded.model.named_parameters())) == set(dict(load(base).model.named_parameters()))
    params = sum(p.numel() for p in loaded.model.parameters())
    assert summary["params"] == params
    assert (summary["params_trained"] == params) == (stage is None)


@pytest.mark.parametrize("stage", STAGES, ids=["full", "adapters", "vocabulary"])
def test_nothing_of_the_base_is_lost_before_the_first_step(base, tmp_path, stage, monkeypatch):
    run = _later(base, stage)
    seen = []

    def fit(model, optimizer, *rest, **options):
        seen.append((model.eval()(torch.arange(8)[None]).logits, len(optimizer.state), optimizer.param_groups))
        raise UserError("that will do")

    monkeypatch.setattr(session, "fit", fit)
    with pytest.raises(UserError, match="that will do"):
        train(run, tmp_path, quiet=True)
    logits, moments, groups = seen[0]
    torch.testing.assert_close(logits, load(base).model(torch.arange(8)[None]).logits, rtol=1e-6, atol=1e-6)
    assert moments == 0
    assert all(p.requires_grad for group in groups for p in group["params"])


def test_adapters_alone_change(base, tmp_path):
    home = train(_later(base, Adapters(rank=2)), tmp_path, quiet=True)
    kept, before = (load_tensors(load(run).path / "model.safetensors") for run in (home, base))
    for name, weight in kept.items():
        if not name.endswith((".up", ".down")):
            plain = name.replace("parametrizations.", "").removesuffix(".original")
            assert torch.equal(weight, before[plain]), name
    optimizer = load_tensors(load(home).path / "optimizer.safetensors")
    assert {name.rpartition("/")[0].rpartition(".")[2] for name in optimizer} == {"up", "down"}


@pytest.mark.parametrize("stage", STAGES, ids=["full", "adapters", "vocabulary"])
def test_resumed_without_its_base_it_is_the_same_to_the_bit(base, tmp_path, stage, monkeypatch):
    run = _later(base, stage, "train.save_every=3", "train.keep=9", name="whole")
    whole = train(run, tmp_path, quiet=True)
    halves = run.model_copy(update={"name": "halves"})
    shutil.copytree(whole, tmp_path / "halves")
    shutil.rmtree(checkpoint_path(tmp_path / "halves", 6))
    (tmp_path / "halves" / "summary.json").unlink()
    shutil.rmtree(base)
    home = train(halves, tmp_path, quiet=True)
    for name in ("model", "optimizer"):
        one, two = (checkpoint_path(run, 6) / f"{name}.safetensors" for run in (whole, home))
        assert one.read_bytes() == two.read_bytes()


def test_the_start_is_part_of_the_identity_and_its_place_is_not(base, tmp_path):
    run = _later(base, None)
    assert run.hash() != run.model_copy(update={"start": None}).hash()
    assert "start" not in run.model_copy(update={"start": None}).decisive()
    moved = run.model_copy(update={"start": run.start.model_copy(update={"run": "elsewhere"})})
    assert moved.hash() == run.hash()
    assert run.hash() != _later(base, Adapters(rank=2)).hash() != _later(base, Adapters(rank=3)).hash()


def test_a_base_that_moved_or_changed_is_refused_and_leaves_nothing(base, tmp_path, tiny):
    run = _later(base, None, name="later")
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"the run that later starts from cannot be loaded: .*base is no run directory"):
        train(run, tmp_path, quiet=True)
    other = train(tiny("base", steps=2), tmp_path, quiet=True)
    assert other == base
    with pytest.raises(UserError, match="has other weights than later was to start from"):
        train(run, tmp_path, quiet=True)
    assert not (tmp_path / "later").exists()


def test_another_tokenizer_is_refused(base, tmp_path):
    run = _later(base, None, "data.tokenizer=byte")
    with pytest.raises(UserError, match=r"data.tokenizer is 'byte' as configured, but .* 'alphabet'"):
        train(run, tmp_path, quiet=True)
    assert _later(base, None).data.tokenizer.kind == "alphabet"


def test_fine_tuning_can_be_repeated(base, tmp_path):
    first = train(_later(base, Adapters(rank=2), name="first"), tmp_path, quiet=True)
    second = train(_later(first, Adapters(rank=2), name="second"), tmp_path, quiet=True)
    assert weights_digest(load(second).model) != weights_digest(load(first).model)


MISTAKES = [
    ({"flags": {}}, "say what to train"),
    ({"overrides": ["model.width=8"]}, "'model' comes from"),
    ({"overrides": ["start.weights=0"]}, "'start' comes from"),
    ({"path": "later.yaml"}, "not both"),
    ({"overrides": ["train.stepz=3"]}, "did you mean 'steps'"),
]


@pytest.mark.parametrize(("call", "says"), MISTAKES)
def test_mistakes_are_one_sentence(base, tmp_path, call, says):
    path = tmp_path / call["path"] if "path" in call else None
    with pytest.raises(UserError, match=says):
        read(base, path, call.get("overrides", []), call.get("flags", {"tasks": "copy"}), None)


def test_a_file_gives_data_training_and_evaluation(base, tmp_path):
    path = tmp_path / "later.yaml"
    path.write_text(
        "{data: {sequence: 24, sources: [{kind: task, task: copy}]}, train: {steps: 2}, eval: {samples: 7}}"
    )
    run = read(base, path, ["train.steps=3"], {}, None, seed=9)
    assert (run.name, run.seed, run.train.steps, run.eval.samples) == ("base-finetuned", 9, 3, 7)
    assert (run.data.sequence, run.train.lr, run.data.tokenizer.kind) == (24, 0.003, "alphabet")
    path.write_text("{model: transformer, data: {sources: []}, train: {steps: 2}}")
    with pytest.raises(UserError, match="'model' comes from"):
        read(base, path, [], {}, None)
