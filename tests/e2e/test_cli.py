"""The commands as a user meets them: real processes, real exit codes, one sentence for every mistake."""

import io
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
    for command in ("train", "eval", "sample", "climb", "report", "check", "list", "show", "trace"):
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
    (["train", "--plugin", "absent.py"], "absent.py"),
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
    (["show", "transformer", "--context", "many"], "context"),
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
    shown = stepladder("show", "shared_loop", "width=64", "--context", "64,128", "--ticks", "8")
    assert shown.returncode == 0, shown.stderr
    assert "models.lm.LanguageModel.forward" in shown.stdout
    assert "train/step.py" in shown.stdout
    assert "↻ 8 ticks" in shown.stdout
    assert "applications of the shared blocks" in shown.stdout
    for section, field in (("train", "warmup"), ("data", "sequence"), ("eval", "top_p"), ("ladder", "margin_bits")):
        assert field in stepladder("show", section).stdout
    listed = stepladder("list").stdout
    for name in ("shared_loop", "parity", "likelihood", "causal"):
        assert name in listed


def test_costs_fit_a_terminal_of_80_columns():
    from rich.console import Console

    from stepladder import show
    from stepladder.models.zoo import spec

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(show.costs(spec("shared_loop"), 259, "128,4096,131072", 1023, 8))
    assert "…" not in console.export_text()
    assert show.size(1023) == "0.999 KiB"


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    from stepladder import cli

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.plugins, "load", stop)
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
