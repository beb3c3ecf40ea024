"""The two pictures."""

from __future__ import annotations

import struct

import pytest

from stepladder.train.plots import draw

LINES = [
    {"step": 1, "loss": 2.0, "event": None},
    {"step": 1, "event": "skipped", "cause": "the loss is nan"},
    {"step": 2, "loss": None, "event": None},
    {"step": 3, "loss": 0.0, "event": None},
    {"step": 4, "loss": 1.0, "event": None},
    {"step": 4, "eval": {"algorithmic/copy": 0.25, "algorithmic/parity": None, "bits_per_byte/pydoc": 2.0}},
]


def size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("title", ["a run", r"$\frac{1$ _^{"])
def test_both_are_drawn_with_gaps_skips_and_any_title(tmp_path, title):
    draw(tmp_path, LINES, title)
    assert size(tmp_path / "loss.png") == size(tmp_path / "accuracy.png") == (704, 440)


@pytest.mark.parametrize("lines", [[], LINES[:2], [{"step": 2, "loss": None}]])
def test_without_accuracies_there_is_a_loss_picture_only(tmp_path, lines):
    draw(tmp_path, lines, "empty")
    assert size(tmp_path / "loss.png")
    assert not (tmp_path / "accuracy.png").exists()
