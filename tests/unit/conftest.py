"""Little sets of images made on the spot: bars, whose class is which way they lie and on which side."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = 4


def make_bars(count: int, seed: int = 0, side: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, side, side] with noise, and labels uint8 [n]: a bar at the top, bottom, left or right."""
    dice = np.random.default_rng(seed)
    labels = dice.integers(0, CLASSES, count).astype(np.uint8)
    pixels = dice.integers(0, 60, (count, side, side)).astype(np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        lying = image if label < 2 else image.T
        start = dice.integers(0, 2) if label % 2 == 0 else side - 2 - dice.integers(0, 2)
        lying[start : start + 2] = 220
    return pixels, labels


def make_idx(folder: Path, train: int = 96, test: int = 40, side: int = 8, packed: bool = True) -> Path:
    """The four idx files of such a set."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", train, 0), ("t10k", test, 1)):
        pixels, labels = make_bars(count, seed, side)
        for name, array in ((f"{split}-images-idx3-ubyte", pixels), (f"{split}-labels-idx1-ubyte", labels)):
            head = b"\0\0\x08" + bytes([array.ndim]) + b"".join(size.to_bytes(4) for size in array.shape)
            data = head + array.tobytes()
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    return folder


def make_folders(folder: Path, splits: tuple[str, ...] = ("train", "test"), count: int = 48) -> Path:
    """A folder for every class, under each of the splits ("" for none)."""
    for seed, split in enumerate(splits):
        for number, (image, label) in enumerate(zip(*make_bars(count, seed), strict=True)):
            place = folder / split / ("top", "bottom", "left", "right")[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number:03}.png")
    return folder


@pytest.fixture
def bars():
    """``bars(count, seed)``: images and labels."""
    return make_bars


@pytest.fixture
def write_idx():
    """``write_idx(folder)``: the four idx files; returns the folder."""
    return make_idx


@pytest.fixture
def write_folders():
    """``write_folders(folder, splits)``: a folder for every class; returns the folder."""
    return make_folders
