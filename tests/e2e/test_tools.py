"""Samples, drawings and exports from the command line, on a run that was just trained."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """``call(*words)`` in a folder that has runs/run: (exit status, stdout, stderr, folder)."""
    home = tmp_path_factory.mktemp("tools")
    environment = {**os.environ, "STEPLADDER_CACHE": str(home / "cache"), "COLUMNS": "160", "OMP_NUM_THREADS": "1"}

    def run(*words):
        command = [sys.executable, "-m", "stepladder.cli", *words]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=240)
        return done.returncode, done.stdout, done.stderr, home

    small = ["model.width=16", "model.depth=1", "model.heads=2", "data.sequence=32", "train.batch=4"]
    train = ["train", "--model", "shared_loop", "--tasks", "copy", "--steps", "2", "--no-evaluate", "--quiet", *small]
    assert run(*train)[0] == 0
    return run


def test_samples_of_a_file_are_shown_and_written(call, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab="}\n{"prompt": "c=", "ticks": 2}\n')
    options = ["--prompts", str(tmp_path / "p.jsonl"), "--max-new", "3", "--show-ticks"]
    code, out, err, home = call("sample", "runs/run", *options, "--html", "s.html", "--out", "s.jsonl")
    assert code == 0, err
    assert out.splitlines()[0].split() == ["ticks", "2", "4"]
    assert "a₄b₄=₄" in out
    assert "c₂=₂" in out
    assert (home / "s.html").read_text().count("<article>") == 2
    assert [json.loads(line)["prompt"] for line in (home / "s.jsonl").read_text().splitlines()] == ["ab=", "c="]
    code, _, err, _ = call("sample", "runs/run")
    assert code == 2
    assert "nothing to continue" in err


def test_architectures_are_drawn(call):
    code, out, err, home = call("draw", "shared_loop", "depth=2", "--ticks", "5", "--out", "loop.svg")
    assert (code, out.strip()) == (0, "drawing: loop.svg"), err
    assert "5 ticks" in (home / "loop.svg").read_text()
    assert call("draw", "ssm", "--autograd")[0] == 0
    assert "backward pass" in (home / "ssm.svg").read_text()
    code, _, err, _ = call("draw", "transfomer")
    assert code == 2
    assert "did you mean 'transformer'" in err


def test_a_run_is_exported_or_says_what_it_needs(call):
    code, _, err, home = call("export", "runs/run", "--onnx", "step.onnx", "--capacity", "16")
    if importlib.util.find_spec("onnx") is None:
        assert code == 2
        assert "pip install 'stepladder[onnx]'" in err
        assert not (home / "step.onnx").exists()
    else:
        assert code == 0, err
        assert json.loads((home / "step.onnx.json").read_text())["capacity"] == 16
