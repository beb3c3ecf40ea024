"""A run that starts from another: the model comes from there, data, training and evaluation from a file or flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepladder.core.config import override, read_tree, validate
from stepladder.core.errors import UserError
from stepladder.models.weights import weights_digest
from stepladder.run import Run, from_flags, load
from stepladder.start import Adapters

_FROM_BASE = ("model", "start")


def stage(rank: int | None, full: bool, alpha: float | None = None, vocabulary: bool = False) -> Adapters | None:
    """Adapters of ``rank``, or None for all weights; whoever asks for neither or both gets a UserError."""
    if (rank is not None) == full:
        raise UserError("say what is trained: either --adapters RANK or --full, all weights" + " (not both)" * full)
    if full and (alpha is not None or vocabulary):
        flag = "--vocabulary" if alpha is None else "--alpha"
        raise UserError(f"{flag} belongs to adapters, and with --full there are none; leave it out")
    tree = {"rank": rank, "alpha": alpha, "vocabulary": vocabulary}
    return None if rank is None else validate(Adapters, tree, "--adapters")


def read(
    base: Path,
    path: Path | None,
    overrides: list[str],
    flags: dict[str, Any],
    stage: Adapters | None,
    *,
    name: str | None = None,
    seed: int | None = None,
) -> Run:
    """The run that trains ``base`` further: with ``stage`` adapters, or, with None, all its weights.

    path: file with ``data``, ``train`` and, if wanted, ``eval``; or flags: tasks, text, steps, as in ``run.read``, then
    with rows as long as the base's. The tokenizer is the base's, and another one is a UserError.
    """
    if path is not None and "=" in path.name:  # no file was given, and this is the first override
        path, overrides = None, [str(path), *overrides]
    given = {flag: value for flag, value in flags.items() if value is not None}
    if path is not None and given:
        told = " ".join(f"--{flag}" for flag in given)
        raise UserError(f"give either the file {path} or {told}, not both; with a file, write train.steps=... instead")
    if path is None and not given.keys() & {"tasks", "text"}:
        raise UserError(f"say what to train {base} on: a file with data and train, or --tasks or --text")
    loaded = load(base, device="cpu")
    if path is None:
        tree = from_flags(given, overrides)
        del tree["model"]
        tree["data"]["sequence"] = loaded.run.data.sequence
    else:
        tree = read_tree(path)
    tree = override(tree, overrides)
    for node in (node for node in _FROM_BASE if node in tree):
        raise UserError(f"{path or 'flags'}: '{node}' comes from {base}; leave it out")
    if isinstance(tree.get("data"), dict):
        tree["data"] = {"tokenizer": loaded.run.data.tokenizer.model_dump(mode="json"), **tree["data"]}
    start = {"run": str(base), "weights": weights_digest(loaded.model), "adapters": stage and stage.model_dump()}
    own = {"name": name or tree.get("name") or f"{loaded.run.name}-finetuned", "seed": seed}
    tree = {**tree, **{field: value for field, value in own.items() if value is not None}}
    return Run.of({**tree, "model": loaded.run.model.model_dump(mode="json"), "start": start}, str(path or "flags"))
