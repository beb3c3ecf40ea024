"""A session: what a run directory holds, what is refused, what stays untouched."""

from __future__ import annotations

import fcntl
import random
import shutil
import signal

import numpy as np
import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.core.files import Corrupt, read_json, read_lines
from stepladder.data.stream import Stream
from stepladder.data.tokenizers import from_json
from stepladder.run import Run, checkpoints, latest_checkpoint, load
from stepladder.train import session
from stepladder.train.loop import fit
from stepladder.train.session import build, train


def test_a_run_directory_is_complete_and_loads(tmp_path, tiny):
    run = tiny(save_every=2, keep=2, eval_every=4)
    home = train(run, tmp_path, evaluate=lambda *_: {"algorithmic/copy": 0.5, "bits_per_byte/x": 2.0}, quiet=True)
    assert home == tmp_path / "run"
    assert sorted(path.name for path in home.iterdir() if not path.name.startswith(".")) == [
        "accuracy.png",
        "checkpoints",
        "config.json",
        "data.json",
        "loss.png",
        "metrics.json",
        "metrics.jsonl",
        "provenance.json",
        "summary.json",
        "tokenizer.json",
    ]
    assert Run.of(read_json(home / "config.json")) == run
    lines = read_lines(home / "metrics.jsonl")
    assert read_json(home / "metrics.json") == lines
    assert [(line["step"], "eval" in line) for line in lines] == [
        (2, False),
        (4, False),
        (4, True),
        (6, False),
        (6, True),
    ]
    loaded = load(home)
    assert (loaded.step, loaded.path.name, loaded.run) == (6, "step-00000006", run)
    assert loaded.tokenizer.fingerprint == from_json((home / "tokenizer.json").read_text()).fingerprint
    assert not loaded.model.training
    assert load(home, 4).step == 4
    assert load(home, home / "checkpoints/step-00000004").step == 4
    with pytest.raises(UserError, match=r"there: step-00000004, step-00000006"):
        load(home, 2)


def test_the_summary_counts_what_was_done(tmp_path, tiny):
    run = tiny()
    home = train(run, tmp_path, quiet=True)
    summary = read_json(home / "summary.json")
    stream = Stream(run.data, run.seed, tmp_path)
    batches = [stream.batch(step, np.arange(4), 4) for step in range(6)]
    model = build(run, stream.tokenizer.vocab)
    params = sum(p.numel() for p in model.parameters())
    assert summary["status"] == "complete"
    assert summary["steps"] == summary["updates"] == 6
    assert summary["tokens"] == 6 * 4 * 32
    assert summary["supervised"] == sum(int((batch.targets >= 0).sum()) for batch in batches)
    assert summary["train_flops"] == pytest.approx(3 * model.cost(32).flops * summary["tokens"])
    assert summary["params"] == params == model.cost(32).params
    assert summary["params_nonembedding"] == params - model.embed.tokens.weight.numel()
    assert summary["hash"] == run.hash()
    assert summary["final_loss"] == read_lines(home / "metrics.jsonl")[-1]["loss"]
    assert summary["peak_memory_bytes"] > 1e7
    assert summary["seconds"] > 0


def test_the_loss_falls(tmp_path, tiny):
    home = train(tiny(steps=60, batch=16, lr=1e-2, log_every=20), tmp_path, quiet=True)
    losses = [line["loss"] for line in read_lines(home / "metrics.jsonl")]
    assert losses[-1] < 0.8 * losses[0]


def test_an_equal_run_is_done_already(tmp_path, tiny):
    home = train(tiny(), tmp_path, quiet=True)
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    assert train(tiny(), tmp_path, quiet=True) == home
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


@pytest.mark.parametrize("budget", [{"tokens": 600}, {"flops": 1e8}, {"seconds": 0.05}])
def test_other_budgets_end_where_they_say(tmp_path, tiny, budget):
    summary = read_json(train(tiny(**budget), tmp_path, quiet=True) / "summary.json")
    spent = {"tokens": summary["tokens"], "flops": summary["train_flops"], "seconds": summary["seconds"]}
    (unit, asked), step = *budget.items(), {name: value / summary["steps"] for name, value in spent.items()}
    assert summary["status"] == "complete"
    if unit == "seconds":
        assert asked <= spent[unit] + 1e-3
    else:
        assert abs(spent[unit] - asked) <= step[unit] / 2 + 1e-6


BROKEN = [
    ({"losses": {"ponder": 0.1}}, {}, "the model has no loss 'ponder'"),
    ({}, {"heads": 5}, "heads"),
    ({}, {"positions": "learned", "max_positions": 2}, "learned positions"),
]


@pytest.mark.parametrize(("fields", "model", "told"), BROKEN)
def test_what_cannot_run_leaves_no_directory(tmp_path, tiny, fields, model, told):
    with pytest.raises(UserError, match=told):
        train(tiny(model=model, **fields), tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs").exists()


def test_one_process_trains_a_run_at_a_time(tmp_path, tiny):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being trained by another process"):
            train(tiny(), tmp_path, quiet=True)
    train(tiny(), tmp_path, quiet=True)


def test_a_failure_is_summarised_and_raised(tmp_path, tiny):
    def fail(*_):
        raise RuntimeError("with password=hunter22 inside")

    with pytest.raises(RuntimeError):
        train(tiny(), tmp_path, evaluate=fail, quiet=True)
    summary = read_json(tmp_path / "run/summary.json")
    assert (summary["status"], summary["steps"]) == ("failed", 6)
    assert summary["reason"] == "RuntimeError: with password=[redacted] inside"


def test_edited_metrics_stop_a_resume(tmp_path, tiny):
    home = train(tiny(save_every=2), tmp_path, quiet=True)
    (home / "summary.json").unlink()
    text = (home / "metrics.jsonl").read_text()
    (home / "metrics.jsonl").write_text(text.replace('"step": 2', '"step": 1', 1))
    with pytest.raises(Corrupt, match="line 1"):
        train(tiny(save_every=2), tmp_path, quiet=True)


def test_changed_data_stop_a_resume(tmp_path, tiny):
    def with_text(words: str) -> Run:
        documents = [f"{words} number {i} of some documents.\n\n" for i in range(400)]
        (tmp_path / "text.txt").write_text("".join(documents))
        tree = tiny().tree()
        tree["data"] = {"sequence": 32, "sources": [{"kind": "text", "path": str(tmp_path / "text.txt")}]}
        return Run.of(tree)

    home = train(with_text("old"), tmp_path, quiet=True)
    (home / "summary.json").unlink()
    with pytest.raises(UserError, match=r"the data of .* have changed"):
        train(with_text("new"), tmp_path, quiet=True)
    train(with_text("old"), tmp_path, quiet=True)


def test_evaluation_changes_nothing(tmp_path, tiny):
    def disturb(model, tokenizer, run):
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.manual_seed(1)
        torch.rand(5)
        return {"figure": float("nan"), "other": 1.0}

    run = tiny(model={"dropout": 0.2}, eval_every=1)
    calm = train(tiny("calm", model={"dropout": 0.2}, eval_every=1), tmp_path, quiet=True)
    disturbed = train(run, tmp_path, evaluate=disturb, quiet=True)
    files = [(latest_checkpoint(home) / "model.safetensors").read_bytes() for home in (calm, disturbed)]
    assert files[0] == files[1]
    assert read_lines(disturbed / "metrics.jsonl")[-1]["eval"] == {"figure": None, "other": 1.0}


def test_global_state_is_as_before(tmp_path, tiny):
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    settings = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    train(tiny(threads=1), tmp_path, quiet=True)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == settings


def test_initial_weights_are_a_function_of_the_seed(tiny):
    torch.manual_seed(1)
    one = build(tiny(), 20)
    torch.manual_seed(2)
    two, other = build(tiny(), 20), build(tiny().model_copy(update={"seed": 6}), 20)
    weights = [model.core.core.parts[0].part.project.weight for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_run_that_moved_to_another_device_says_so(tmp_path, tiny, capsys):
    home = train(tiny(save_every=2), tmp_path, quiet=True)
    (home / "summary.json").unlink()
    text = (home / "provenance.json").read_text()
    (home / "provenance.json").write_text(text.replace('"device": "cpu', '"device": "abacus'))
    train(tiny(save_every=2), tmp_path, quiet=True)
    assert "began on abacus" in capsys.readouterr().err


def test_load_names_what_is_missing(tmp_path, tiny):
    with pytest.raises(UserError, match="is no run directory"):
        load(tmp_path)
    home = train(tiny(), tmp_path, quiet=True)
    for path in home.glob("checkpoints/*/model.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="no sound checkpoint"):
        load(home)


def test_a_signal_before_the_first_step_is_a_checkpoint_too(tmp_path, tiny, monkeypatch):
    def signalled(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return fit(*args, **kwargs)

    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    whole = train(tiny("whole"), tmp_path, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(session, "fit", signalled)
        with pytest.raises(session.Interrupted) as stopped:
            train(tiny("cut"), tmp_path, quiet=True)
    assert stopped.value.code == 130
    assert load(tmp_path / "cut").step == 0
    assert signal.getsignal(signal.SIGINT) is before
    cut = train(tiny("cut"), tmp_path, quiet=True)
    files = [(latest_checkpoint(home) / "optimizer.safetensors").read_bytes() for home in (whole, cut)]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_run_learns_like_an_eager_one(tmp_path, tiny):
    eager = train(tiny("eager"), tmp_path, quiet=True)
    compiled = train(tiny("compiled", compile=True), tmp_path, evaluate=lambda m, *_: {"v": 1.0}, quiet=True)
    losses = [read_json(home / "summary.json")["final_loss"] for home in (eager, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert load(compiled).step == 6


def test_a_failing_evaluation_costs_no_training(tmp_path, tiny):
    def fail(*_):
        raise RuntimeError("in the evaluation")

    with pytest.raises(RuntimeError):
        train(tiny(save_every=100), tmp_path, evaluate=fail, quiet=True)
    assert load(tmp_path / "run").step == 6
    home = train(tiny(save_every=100), tmp_path, evaluate=lambda *_: {"figure": 1.0}, quiet=True)
    lines = read_lines(home / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval" in line] == [6]


def test_a_rehearsal_comes_before_the_directory(tmp_path, tiny):
    def refuse(run):
        raise UserError("no such suite")

    with pytest.raises(UserError, match="no such suite"):
        train(tiny(), tmp_path / "runs", quiet=True, rehearse=refuse)
    assert not (tmp_path / "runs").exists()


def test_unasked_a_checkpoint_is_kept_every_tenth_of_the_budget(tmp_path, tiny):
    home = train(tiny(steps=25, keep=100), tmp_path, quiet=True)
    assert [int(path.name[5:]) for path in checkpoints(home)] == [*range(3, 25, 3), 25]


@pytest.mark.parametrize("place", ["", "run"])
def test_a_file_in_the_way_is_one_sentence(tmp_path, tiny, place):
    root = tmp_path / "runs"
    if place:
        root.mkdir()
    (root / place).write_text("a file")
    with pytest.raises(UserError, match="cannot be used as the directory of a run"):
        train(tiny(), root, quiet=True)


def test_a_finished_run_says_so_and_takes_up_what_decides_nothing(tmp_path, tiny, capsys):
    home = train(tiny(), tmp_path, quiet=True)
    train(tiny(), tmp_path, quiet=True)
    assert capsys.readouterr().err == ""
    train(tiny(eval_samples=7), tmp_path)
    assert capsys.readouterr().err == "run: already done\n"
    assert Run.of(read_json(home / "config.json")) == tiny(eval_samples=7)


def test_a_finished_run_without_its_checkpoints_is_trained_anew(tmp_path, tiny):
    home = train(tiny(), tmp_path, quiet=True)
    weights = (latest_checkpoint(home) / "model.safetensors").read_bytes()
    shutil.rmtree(home / "checkpoints")
    train(tiny(), tmp_path, quiet=True)
    assert (latest_checkpoint(home) / "model.safetensors").read_bytes() == weights


def test_a_run_without_its_tokenizer_is_one_sentence(tmp_path, tiny):
    home = train(tiny(), tmp_path, quiet=True)
    (home / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer.json"):
        load(home)


def test_a_model_loads_onto_the_gpu_if_there_is_one(tmp_path, tiny):
    loaded = load(train(tiny(), tmp_path, quiet=True))
    assert loaded.model.embed.tokens.weight.is_cuda == torch.cuda.is_available()


def test_the_overlap_of_a_task_is_measured(tmp_path, tiny):
    home = train(tiny(), tmp_path, quiet=True)
    assert read_json(home / "data.json")["overlap"] == {"copy": {"exact": 0, "normalised": 0, "canonical": 0}}
