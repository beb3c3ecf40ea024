"""Runs to evaluate: tiny untrained models of real architectures, and models that answer by a script."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepladder.core.config import validate
from stepladder.data.tokenizers import TOKENIZERS
from stepladder.models.zoo import ARCHITECTURES
from stepladder.run import Loaded, Run

TASKS = [
    {"kind": "task", "task": {"kind": "parity", "train": [4, 16], "iid": [8, 16], "ood": [20]}},
    {"kind": "task", "task": {"kind": "addition", "train": [1, 4], "iid": [4], "ood": [6]}},
]


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Loaded]:
    """``make(sources, model=..., eval=...)``: a Loaded whose run directory does not exist yet."""
    monkeypatch.setenv("STEPLADDER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))

    def build(sources: Any = None, model: str = "transformer", **parts: Any) -> Loaded:
        tree = {
            "model": {"kind": model, **parts.pop("fields", {})},
            "data": {"sequence": 32, "sources": TASKS if sources is None else sources},
            "train": {"steps": 1, "eval_samples": 12},
            "eval": {"samples": 20, "lengths": [256], **parts.pop("eval", {})},
            **parts,
        }
        small = {"width": 16, "depth": 1, "heads": 2}
        tiny = {name: value for name, value in small.items() if name in ARCHITECTURES.get(model).model_fields}
        run = validate(Run, {**tree, "model": {**tiny, **tree["model"]}}, "test")
        tokenizer = TOKENIZERS.get("byte")().build("", iter(()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = run.build(tokenizer.vocab).eval()
        home = tmp_path_factory.mktemp("run")
        return Loaded(run, network, tokenizer, 1, home / "checkpoints" / "step-00000001")

    return build
