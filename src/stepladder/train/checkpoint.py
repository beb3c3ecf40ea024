"""Checkpoints: a folder appears whole or not at all, is verified before use, and rotation never leaves none.

``checkpoints/step-00000200/`` holds model.safetensors, optimizer.safetensors, state.json and, written last,
manifest.json with the SHA-256 of each. All of it is built in a hidden folder and made visible by one rename; what is
old is renamed out of sight before it is deleted. A process that is killed leaves at most hidden folders, which the
next save clears away.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stepladder.core.errors import UserError
from stepladder.core.files import publish_dir, write_json, write_manifest
from stepladder.models.lm import LanguageModel
from stepladder.models.weights import load_tensors, load_weights, save_tensors, save_weights
from stepladder.run import CHECKPOINT_SCHEMA, checkpoint_path, checkpoints, latest_checkpoint, read_state
from stepladder.train.optim import optimizer_tensors, restore_optimizer

_HIDDEN = ".unfinished-"


def save(
    run_dir: Path,
    step: int,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of ``step``, durably, then drop all but the ``keep`` newest; returns its folder.

    ``state`` is plain data to go on from (counters). An OSError (disk full, read-only) leaves every
    older checkpoint as it was and nothing half-written.
    """
    final = checkpoint_path(run_dir, step)
    _sync(run_dir / "metrics.jsonl")  # what led to this checkpoint must not be lost by a power cut that spares it
    _clear_hidden(final.parent)
    building = final.parent / f"{_HIDDEN}{secrets.token_hex(4)}"
    building.mkdir(parents=True)
    try:
        save_weights(model, building / "model.safetensors")
        save_tensors(optimizer_tensors(model, optimizer), building / "optimizer.safetensors")
        write_json(building / "state.json", {"schema": CHECKPOINT_SCHEMA, "step": step, **state})
        write_manifest(building)
        _hide(final)
        publish_dir(building, final)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    for old in checkpoints(run_dir)[:-keep]:
        _hide(old)
    _clear_hidden(final.parent)
    return final


def restore(folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put the weights and optimizer state of a checkpoint (one from ``to_resume``) into place; returns its ``state``.

    A checkpoint without optimizer state cannot be gone on from exactly and is refused: ``stepladder.load``
    gives its weights alone to those who want just them.
    """
    state = read_state(folder)
    if not (folder / "optimizer.safetensors").is_file():
        raise UserError(
            f"{folder} has weights but no optimizer state, so training cannot go on from it exactly; "
            f"remove that folder to go on from an older one, or use the weights alone through stepladder.load"
        )
    load_weights(model, folder / "model.safetensors")
    restore_optimizer(model, optimizer, load_tensors(folder / "optimizer.safetensors"))
    return {name: value for name, value in state.items() if name not in ("schema", "step")}


def to_resume(run_dir: Path) -> Path | None:
    """The newest complete checkpoint, and the newer flawed ones set aside as ``flawed-step-...``; None = none yet.

    If there are checkpoints and none is sound, that is a UserError: starting again must be somebody's decision.
    """
    found = latest_checkpoint(run_dir)
    present = checkpoints(run_dir)
    flawed = present if found is None else present[present.index(found) + 1 :]
    if flawed and found is None:
        raise UserError(
            f"none of the {len(flawed)} checkpoints in {run_dir / 'checkpoints'} is sound; restore them, "
            f"or remove {run_dir} to train from the start"
        )
    for path in flawed:
        aside = path.with_name(f"flawed-{path.name}-{secrets.token_hex(4)}")
        os.rename(path, aside)
        print(f"stepladder: {path.name} is set aside as {aside}", file=sys.stderr)
    return found


def _hide(folder: Path) -> None:
    if folder.exists():
        os.rename(folder, folder.with_name(f"{_HIDDEN}{secrets.token_hex(4)}"))


def _clear_hidden(folder: Path) -> None:
    for path in folder.glob(f"{_HIDDEN}*"):
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())
