"""A tiny run for the tests of this folder, and a token cache away from home."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stepladder.models.zoo import ARCHITECTURES
from stepladder.run import Run


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("STEPLADDER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Run]:
    """``tiny(name, kind, model={...}, **train fields)``: a run of a few milliseconds a step."""

    def make(name: str = "run", kind: str = "transformer", model: dict[str, Any] | None = None, **fields: Any) -> Run:
        budget = {} if {"tokens", "flops", "seconds"} & set(fields) else {"steps": 6}
        tree = {
            "name": name,
            "seed": 5,
            "model": {"kind": kind, **ARCHITECTURES.get(kind).tiny, **(model or {})},
            "data": {"sequence": 32, "tokenizer": "alphabet", "sources": [{"kind": "task", "task": "copy"}]},
            "train": {**budget, "device": "cpu", "batch": 4, "log_every": 2, **fields},
        }
        return Run.of(tree)

    return make
