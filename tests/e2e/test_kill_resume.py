"""kill -9 at random moments of a training, resume: weights, optimizer and metrics end up byte for byte the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stepladder.core.files import read_json, read_lines
from stepladder.run import Run, latest_checkpoint

DRIVER = """
import json, sys
from pathlib import Path
from stepladder.run import Run
from stepladder.train.session import train

run = Run.of(json.loads(Path(sys.argv[1]).read_text()))
train(run, Path(sys.argv[2]), evaluate=lambda *_: {"figure": 1.0}, quiet=True)
"""
CLOCK = ("seconds", "tokens_per_s")


def start(run: Run, root: Path) -> subprocess.Popen[str]:
    (root / "run.json").write_text(json.dumps(run.tree()))
    command = [sys.executable, "-c", DRIVER, str(root / "run.json"), str(root)]
    environment = {**os.environ, "STEPLADDER_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def results(home: Path) -> tuple[bytes, bytes, list[dict]]:
    last = latest_checkpoint(home)
    lines = [{k: v for k, v in line.items() if k not in CLOCK} for line in read_lines(home / "metrics.jsonl")]
    return (last / "model.safetensors").read_bytes(), (last / "optimizer.safetensors").read_bytes(), lines


def sessions(home: Path) -> int:
    try:
        return len(read_json(home / "provenance.json")["sessions"])
    except Exception:  # not there yet
        return 0


def killed_until_done(name: str, kind: str, root: Path, run: Run, kills: int, whole: float) -> Path:
    """Train with ``kills`` kills, each at a random instant between the session's first sign of life and twice its fair
    share of the ``whole`` duration, so that the last life still has something to do."""
    chance, home, done = random.Random(f"{name}{kind}"), root / run.name, 0
    while done < kills:
        before = sessions(home)
        process = start(run, root)
        while sessions(home) == before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, whole / kills))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed: make it longer"
        done += 1
    finish(start(run, root))
    return home


def compare(tmp_path: Path, kind: str, steps: int, kills: int) -> None:
    """``steps`` is large enough for the kills; the whole run's own duration sets the pace of them."""
    tree = {
        "seed": 3,
        "model": {"kind": kind, "width": 32, "depth": 2, "heads": 2, "dropout": 0.1},
        "data": {
            "sequence": 64,
            "sources": [
                {"kind": "task", "task": "parity", "ramp": steps, "weight": 2.0},
                {"kind": "text", "path": "pydoc", "weight": [[0, 0.0], [steps, 2.0]]},
            ],
        },
        "train": {
            "device": "cpu",
            "steps": steps,
            "batch": 8,
            "micro": 4,
            "save_every": 5,
            "eval_every": 20,
            "log_every": 3,
        },
    }
    finish(start(Run.of({**tree, "name": "whole"}), tmp_path))
    whole = tmp_path / "whole"
    duration = read_json(whole / "summary.json")["seconds"]
    cut = killed_until_done("kill", kind, tmp_path, Run.of({**tree, "name": "cut"}), kills, duration)
    assert sessions(cut) == kills + 1
    assert results(cut) == results(whole)
    figures = ("status", "steps", "updates", "tokens", "supervised", "final_loss", "train_flops")
    ends = [read_json(home / "summary.json") for home in (whole, cut)]
    assert [ends[0][figure] for figure in figures] == [ends[1][figure] for figure in figures]


def test_three_kills_change_no_byte(tmp_path):
    compare(tmp_path, "shared_loop", steps=60, kills=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["transformer", "shared_loop"])
def test_25_kills_change_no_byte(tmp_path, kind):
    compare(tmp_path, kind, steps=200, kills=25)
