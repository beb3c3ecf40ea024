"""The commands as a user meets them: real processes, real exit codes, one sentence for every mistake."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stepladder as sl

LEAK = '''
import torch
from stepladder.core.config import Field
from stepladder.models.base import Cost, Part
from stepladder.models.lm import LanguageModel
from stepladder.models.stack import Stack
from stepladder.models.zoo import Spec, architecture


class MeanOfAll(Part):
    """Adds the mean over the whole sequence, future included."""

    def __init__(self, width):
        super().__init__()
        self.map = torch.nn.Linear(width, width, bias=False)

    def forward(self, x_BTD, state, ctx):
        return x_BTD + self.map(x_BTD.mean(1, keepdim=True)), None

    def cost(self, context, ticks=None):
        return Cost(self.own_params(), 2 * self.own_params() / context)


@architecture("leaky", tiny={"width": 16})
class Leaky(Spec):
    """A mean over the sequence, as in two of the ancestors."""

    width: int = Field(16, description="model width d")

    def build(self, vocab):
        return LanguageModel(vocab, self.width, Stack([MeanOfAll(self.width)]))
'''


@pytest.fixture
def stepladder(tmp_path):
    """Run a command in an empty directory; returns the finished process."""
    environment = {**os.environ, "STEPLADDER_CACHE": str(tmp_path / "cache"), "COLUMNS": "160", "OMP_NUM_THREADS": "1"}

    def call(*words):
        command = [sys.executable, "-m", "stepladder.cli", *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    return call


def test_help_comes_at_once_and_without_torch(stepladder):
    probe = "import sys; from stepladder.cli import app; import stepladder; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "False\n"
    times = []
    for _ in range(3):
        began = time.monotonic()
        done = stepladder("--help")
        times.append(time.monotonic() - began)
    assert done.returncode == 0
    for command in ("train", "finetune", "eval", "sample", "climb", "report", "check", "list", "show", "trace"):
        assert command in done.stdout
    assert min(times) < 2.0  # 0.4 s on an idle machine; the bound allows for a busy one


def test_report_does_without_torch(tmp_path):
    probe = "import sys; import stepladder.report.page; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "False\n"


MISTAKES = [
    (["train", "--model", "transfomer"], "did you mean 'transformer'"),
    (["train", "--tasks", "parety"], "did you mean 'parity'"),
    (["train", "--steps", "0"], "train.steps"),
    (["train", "model.widht=3"], "did you mean 'width'"),
    (["train", "model.width=30"], "heads"),
    (["train", "eval.suites=[algoritmic]"], "did you mean 'algorithmic'"),
    (["train", "model.width"], ".yaml, .yml or .json"),
    (["train", "--text", "nowhere.txt"], "nowhere.txt"),
    (["train", "--name", "../outside"], "../outside"),
    (["train", "absent.yaml"], "absent.yaml"),
    (["train", "given.yaml", "--model", "transformer"], "not both"),
    (["train", "--alg-tokens", "2e7", "--total-tokens", "1e7"], "give 0 < alg_tokens <= total_tokens"),
    (["train", "--alg-tasks", "copy", "--steps", "3"], "--steps cannot be given with a curriculum"),
    (["train", "--plugin", "absent.py"], "absent.py"),
    (["finetune", "runs/absent", "--tasks", "copy", "--full"], "runs/absent is no run directory"),
    (["finetune", "runs/absent", "--tasks", "copy"], "either --adapters RANK or --full"),
    (["finetune", "runs/absent", "--tasks", "copy", "--full", "--adapters", "2"], "(not both)"),
    (["finetune", "runs/absent", "--tasks", "copy", "--full", "--alpha", "2"], "--alpha belongs to adapters"),
    (["finetune", "runs/absent", "given.yaml", "--steps", "2", "--full"], "not both"),
    (["finetune", "runs/absent", "--full"], "say what to train"),
    (["train", "--muon-lr", "0.1"], "muon_lr=0.1 is for Muon"),
    (["train", "--freeze-encoder"], "there is no encoder to freeze"),
    (["eval", "runs/absent"], "runs/absent"),
    (["sample", "runs/absent", "x"], "runs/absent"),
    (["trace", "runs/absent", "--text", "x"], "runs/absent"),
    (["climb", "absent.yaml"], "absent.yaml"),
    (["report", "runs/absent"], "runs/absent"),
    (["check", "transfomer"], "did you mean 'transformer'"),
    (["check", "absent.py"], "absent.py"),
    (["check", "transformer", "--laws", "causl"], "did you mean 'causal'"),
    (["check", "transformer", "--laws", "start, causl"], "did you mean 'causal'"),
    (["check", "given.py"], "given.py registers no architecture; check is for architectures"),
    (["list", "--plugin", "wrong.py"], "plugin 'wrong.py' failed at line 2: NameError: name 'nothing' is not defined"),
    (["train", "given.yaml", "--runs", "given.py/runs"], "given.py"),
    (["show", "transformer", "--size", "huge"], "sizes:"),
    (["data", "compgen", "generate", "--out-dir", "made", "--tasks", "gdc"], "did you mean 'gcd'"),
    (["data", "compgen", "generate", "--out-dir", "made", "--fmt", "tsv"], "fmt = 'tsv'"),
    (["data", "compgen", "generate", "--out-dir", "given.py/made"], "given.py/made' cannot be written"),
    (["data", "compgen", "verify", "absent"], "absent is no dataset of CompGen"),
    (["data", "clrs", "generate", "--out", "a.jsonl", "--algorithms", "bsf"], "did you mean 'bfs'"),
    (["show", "transformer", "--context", "many"], "context"),
    (["show", "transformer", "--precision", "int8"], "precision = 'int8': must be 'fp32' or 'bf16'"),
    (["show", "transformer", "--ticks", "3"], "this architecture has no loop, so ticks=3 means nothing"),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_a_mistake_is_one_sentence_and_leaves_nothing(stepladder, tmp_path, words, says):
    (tmp_path / "given.yaml").write_text(
        "{model: transformer, train: {steps: 1}, data: {sources: [{kind: task, task: copy}]}}"
    )
    (tmp_path / "given.py").write_text("x = 1\n")
    (tmp_path / "wrong.py").write_text("x = 1\nnothing\n")
    before = sorted(tmp_path.rglob("*"))
    done = stepladder(*words)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    left = [p for p in sorted(tmp_path.rglob("*")) if p not in before and not {"cache", "__pycache__"} & set(p.parts)]
    assert left == []


def test_a_planted_leak_is_refused_by_the_name_of_the_law(stepladder, tmp_path):
    (tmp_path / "leaky.py").write_text(LEAK)
    done = stepladder("check", "leaky.py", "--laws", "causal,start")
    assert done.returncode == 1
    rows = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert rows == {"causal": "no", "start": "yes"}


def test_check_passes_the_control_on_a_fast_law(stepladder):
    done = stepladder("check", "transformer", "--laws", "causal, start")
    assert done.returncode == 0, done.stdout


def test_show_and_list_print_what_there_is(stepladder):
    shown = stepladder("show", "shared_loop", "width=64", "--context", "64,128", "--ticks", "8", "--precision", "bf16")
    assert shown.returncode == 0, shown.stderr
    assert "8 ticks, trained in bf16" in shown.stdout
    assert "models.lm.LanguageModel.forward" in shown.stdout
    assert "train/step.py" in shown.stdout
    assert "8 ticks, of which stepladder draw" in shown.stdout
    assert "applications of the shared blocks" in shown.stdout
    for section, field in (("train", "warmup"), ("data", "sequence"), ("eval", "top_p"), ("ladder", "margin_bits")):
        assert field in stepladder("show", section).stdout
    listed = stepladder("list").stdout
    for name in ("shared_loop", "parity", "likelihood", "causal"):
        assert name in listed


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    from stepladder import cli, plugins

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(plugins, "load", stop)
    monkeypatch.setattr(sys, "argv", ["stepladder", "list"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_train_evaluate_sample_and_read_back(stepladder, tmp_path):
    words = ["train", "--model", "shared_loop", "--tasks", "copy", "--steps", "6", "model.width=16", "model.depth=1"]
    first = stepladder(*words, "eval.samples=5", "--name", "one")
    assert first.returncode == 0, first.stderr
    run = tmp_path / "runs" / "one"
    evaluated = (run / "results_algorithmic.json").stat().st_mtime_ns
    again = stepladder(*words, "eval.samples=5", "--name", "one")
    assert again.returncode == 0, again.stderr
    assert (run / "results_algorithmic.json").stat().st_mtime_ns == evaluated
    for file in (
        "config.json",
        "summary.json",
        "metrics.jsonl",
        "loss.png",
        "accuracy.png",
        "results_algorithmic.json",
    ):
        assert (run / file).is_file(), file
    assert json.loads((run / "summary.json").read_text())["status"] == "complete"

    evaluated = stepladder("eval", run, "samples=3", "--suite", "depth, self_test")
    assert evaluated.returncode == 0, evaluated.stderr
    assert {c["ticks"] for c in json.loads((run / "results_depth.json").read_text())["cells"]} >= {1, 4, 16}
    sampled = stepladder("sample", run, "c:31=", "--ticks", "2", "--max-new", "4")
    assert sampled.returncode == 0, sampled.stderr
    assert "c:31=" in sampled.stdout
    odd = "[bold]:heart: \t[/x] " + "long " * 50
    assert stepladder("sample", run, odd, "--max-new", "1").stdout.startswith(odd)

    loaded = sl.load(run)
    assert loaded.step == 6
    assert {r["task"] for r in sl.records(run)["algorithmic"]} == {"copy"}

    only = stepladder("eval", run, "samples=3", "--suite", "algorithmic", "--tasks", "copy")
    assert "only copy" in only.stdout
    refused = stepladder("eval", run, "--tasks", "cpoy")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "eval.tasks: 'cpoy' is no task of this run — did you mean 'copy'?; it has copy" in refused.stderr


def test_fine_tuning_from_flags_evaluates_and_samples(stepladder, tmp_path):
    small = ["model.width=16", "model.depth=1", "model.heads=2", "eval.samples=5"]
    assert stepladder("train", *small, "--tasks", "copy", "--steps", "3", "--name", "one").returncode == 0
    words = ["finetune", "runs/one", "--tasks", "reverse", "--steps", "3", "--adapters", "2", "eval.samples=5"]
    done = stepladder(*words, "--name", "two")
    assert done.returncode == 0, done.stderr
    assert "reverse" in done.stdout
    assert sl.load(tmp_path / "runs" / "two").run.start.adapters.rank == 2
    assert stepladder("sample", "runs/two", "1+2=", "--max-new", "2").returncode == 0
    for more, says in ((["--adapters", "99"], "give a smaller rank"), (["data.tokenizer=char"], "data.tokenizer")):
        wrong = stepladder(*words, *more, "--name", "three")
        assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1), wrong.stderr
        assert says in wrong.stderr
        assert not (tmp_path / "runs" / "three").exists()


def test_flags_of_muon_go_with_a_file_too(stepladder, tmp_path):
    flags = ["--use-muon", "--muon-lr", "0.01", "--aux-adam-lr", "0.002", "--no-evaluate", "--quiet"]
    tree = {"model": "identity", "data": {"sources": [{"kind": "task", "task": "copy"}]}, "train": {"steps": 2}}
    (tmp_path / "mine.yaml").write_text(json.dumps(tree))
    done = stepladder("train", "mine.yaml", *flags)
    assert done.returncode == 0, done.stderr
    train = json.loads((tmp_path / "runs" / "mine" / "config.json").read_text())["train"]
    assert (train["optimizer"], train["muon_lr"], train["lr"]) == ("muon", 0.01, 0.002)


def test_a_curriculum_from_flags_trains_and_scores_both_kinds(stepladder, tmp_path):
    words = ["train", "--alg-tasks", "copy, parity", "--alg-tokens", "5_120", "--total-tokens", "1e4", "train.batch=16"]
    small = ["model.width=16", "model.depth=1", "eval.samples=3", "eval.text_tokens=500"]
    done = stepladder(*words, *small, "--name", "two")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "two"
    sources = json.loads((run / "config.json").read_text())["data"]["sources"]
    weights = [[[4, 0.5], [5, 0.075]]] * 2 + [[[4, 0.0], [5, 0.85]]]
    assert [source["weight"] for source in sources] == weights
    assert json.loads((run / "summary.json").read_text())["steps"] == 10
    assert {r["task"] for r in sl.records(run)["algorithmic"]} == {"copy", "parity"}
    assert {r["source"] for r in sl.records(run)["likelihood"]} == {"pydoc"}


def test_programs_are_made_verified_trained_on_and_scored(stepladder, tmp_path):
    made = ["data", "compgen", "generate", "--out-dir", "made", "--tasks", "gcd, majority", "--dataset-size", "60"]
    done = stepladder(*made, "--max-n", "24", "--ood-n", "40")
    assert done.returncode == 0, done.stderr
    assert "made: 118 train, 2 test, 2 ood, 1 value_ood, 2 tasks" in done.stdout
    assert "all as they should be" in stepladder("data", "compgen", "verify", "made").stdout
    source = {
        "kind": "pairs",
        "path": "made/train.jsonl",
        "valid": ["made/test.jsonl", "made/ood.jsonl"],
        "question": "task={task}\n{x}\n",
        "answer": "{y}",
        "group": "{task}",
        "size": "{meta[n]}",
    }
    run = {
        "model": {"kind": "transformer", "width": 16, "depth": 1, "heads": 2},
        "data": {"sequence": 256, "sources": [source, {"kind": "task", "task": "sort"}]},
        "train": {"steps": 2, "batch": 4},
        "eval": {"suites": ["algorithmic"], "samples": 3},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    done = stepladder("train", "run.json")
    assert done.returncode == 0, done.stderr
    home = tmp_path / "runs" / "run"
    cells = json.loads((home / "results_algorithmic.json").read_text())["cells"]
    assert {(c["task"], c["regime"]) for c in cells} == {
        (task, regime) for task in ("train/gcd", "train/majority", "sort") for regime in ("iid", "ood")
    }
    overlap = json.loads((home / "data.json").read_text())["overlap"]
    assert overlap["train/gcd"] == {"questions": 2, "exact": 0, "normalised": 0}
    (tmp_path / "made" / "test.jsonl").write_text((tmp_path / "made" / "ood.jsonl").read_text())
    done = stepladder("eval", home)
    assert done.returncode == 2
    assert "are not those it was trained on" in done.stderr


def test_climb_on_a_text_of_ones_own_and_report_again(stepladder, tmp_path):
    rows = [{"text": f"Story {i}: " + "the cat sat on the mat. " * 20} for i in range(40)]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ladder = Path("ladders/first.yaml").resolve()
    small = ["run.train.steps=3", "run.train.eval_every=3", "run.eval.samples=4", "run.model.width=16", "seeds=[0,1]"]
    words = ["climb", ladder, *small, "--text", tmp_path / "stories.jsonl"]
    done = stepladder(*words)
    assert done.returncode == 0, done.stderr
    assert "bits per byte on stories" in done.stdout
    assert "\\_" not in done.stdout
    assert "run.train.steps=500" in stepladder("climb", "--help").stdout
    home = tmp_path / "runs" / "first"
    page = (home / "report.html").read_text()
    assert "shared_loop" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    summary = json.loads((home / "ladder.json").read_text())
    assert all(abs(rung["residual"]) <= 0.01 for rung in summary["rungs"].values())

    assert "6 of 6 runs are already done" in stepladder(*words).stdout
    (home / "report.html").unlink()
    assert stepladder("report", home).returncode == 0
    assert (home / "report.html").is_file()


def test_climb_refuses_two_factors(stepladder, tmp_path):
    ladder = Path("ladders/first.yaml").resolve()
    rungs = "rungs={transformer: {}, both: {model.kind: shared_loop, train.lr: 0.1}}"
    done = stepladder("climb", ladder, rungs, "floors=[]")
    assert done.returncode == 2
    assert "changes 2 factors (model.kind, train.lr)" in done.stderr
    assert not (tmp_path / "runs").exists()
