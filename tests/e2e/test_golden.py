"""The first 20 losses of three tiny runs. A change that moves them says why in the CHANGELOG, then writes them anew:

STEPLADDER_WRITE_GOLDEN=1 python -m pytest tests/e2e/test_golden.py
"""

import json
import os
from pathlib import Path

import pytest

from stepladder.core.files import read_lines
from stepladder.run import Run
from stepladder.train.session import train

GOLDEN = Path(__file__).with_name("golden.json")
MODELS = {
    "transformer": {"kind": "transformer", "width": 32, "depth": 2, "heads": 2, "dropout": 0.1},
    "shared_loop": {"kind": "shared_loop", "width": 32, "depth": 1, "heads": 2, "ticks": 3},
    "identity": {"kind": "identity", "width": 32, "depth": 2},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_first_losses_are_what_they_were(name, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPLADDER_CACHE", str(tmp_path / "cache"))
    sources = [{"kind": "task", "task": task} for task in ("parity", "addition", "copy")]
    tree = {
        "name": name,
        "model": MODELS[name],
        "data": {"sequence": 48, "sources": sources},
        "train": {"steps": 20, "batch": 8, "log_every": 1, "precision": "fp32", "device": "cpu"},
    }
    home = train(Run.of(tree), tmp_path, quiet=True)
    losses = [line["loss"] for line in read_lines(home / "metrics.jsonl") if line.get("event") is None]
    assert len(losses) == 20
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("STEPLADDER_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps({**golden, name: losses}, indent=1) + "\n")
        golden = json.loads(GOLDEN.read_text())
    # Other processors sum in another order: float32 rounding, 6e-8, grows over 20 steps to about 1e-5.
    assert losses == pytest.approx(golden[name], rel=1e-4)
