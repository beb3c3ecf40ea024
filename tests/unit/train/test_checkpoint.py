"""Checkpoints: what is in the folder, rotation, replacement; faults are in tests/faults."""

from __future__ import annotations

import pytest
import torch

from stepladder.core.files import read_json, verify_manifest
from stepladder.run import TrainConfig, checkpoints, latest_checkpoint
from stepladder.train import checkpoint
from stepladder.train.optim import adamw
from stepladder.train.session import build


@pytest.fixture
def trained(tiny):
    run = tiny()
    model = build(run, 20)
    return model, adamw(model, TrainConfig(steps=1))


def test_a_checkpoint_is_four_files_and_a_complete_manifest(tmp_path, trained):
    path = checkpoint.save(tmp_path, 12, *trained, {"progress": {"step": 12}}, keep=1)
    assert path == tmp_path / "checkpoints/step-00000012"
    names = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(p.name for p in path.iterdir()) == names
    verify_manifest(path)
    assert read_json(path / "state.json") == {"schema": 1, "step": 12, "progress": {"step": 12}}


def test_the_newest_are_kept(tmp_path, trained):
    for step in (1, 2, 10, 99_999_999, 100_000_000):
        checkpoint.save(tmp_path, step, *trained, {}, keep=3)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000010", "step-99999999", "step-100000000"]
    assert latest_checkpoint(tmp_path).name == "step-100000000"


def test_saving_a_step_again_replaces_it(tmp_path, trained):
    model, optimizer = trained
    checkpoint.save(tmp_path, 5, model, optimizer, {"note": 1}, keep=2)
    with torch.no_grad():
        model.norm.weight.fill_(3.0)
    path = checkpoint.save(tmp_path, 5, model, optimizer, {"note": 2}, keep=2)
    assert read_json(path / "state.json")["note"] == 2
    checkpoint.restore(path, model, optimizer)
    assert float(model.norm.weight.detach()[0]) == 3.0
    assert [p.name for p in path.parent.iterdir()] == ["step-00000005"]


def test_leftovers_of_killed_saves_are_no_checkpoints_and_get_cleared(tmp_path, trained):
    left = tmp_path / "checkpoints/.unfinished-abcd"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    assert checkpoint.to_resume(tmp_path) is None
    checkpoint.save(tmp_path, 1, *trained, {}, keep=1)
    assert not left.exists()


def test_foreign_folders_are_left_alone(tmp_path, trained):
    for name in ("step-final", "best", "step-"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    checkpoint.save(tmp_path, 1, *trained, {}, keep=1)
    assert checkpoint.to_resume(tmp_path).name == "step-00000001"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4
