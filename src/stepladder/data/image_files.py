"""Reading images with labels: idx files, folders by class, Parquet of the hub, and the digits of scikit-learn."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from stepladder.core.errors import UserError
from stepladder.core.redact import redact

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_TEST = ("test", "val", "valid", "validation")  # names of what is not for training, the first that there is


@dataclass(frozen=True)
class Labelled:
    """Images with their labels: ``pixels`` uint8 ``[n, C, Y, X]``, ``labels`` n texts."""

    pixels: np.ndarray
    labels: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Labelled:
        """The images at ``rows`` (positions)."""
        return Labelled(self.pixels[rows], [self.labels[row] for row in rows.tolist()])


def read(path: str, side: int, channels: int) -> tuple[Labelled, Labelled | None]:
    """Training and test images, brought to ``channels`` colours and ``side`` x ``side`` pixels; None = no test part.

    path: "digits" (1,797 handwritten digits of 8 x 8 pixels, of scikit-learn); "hub:OWNER/NAME" (a dataset of the
    Hugging Face hub in Parquet); or a folder, which has idx files (also gzipped, also under MNIST/raw), Parquet files,
    or a folder for every class (also under train/ and test/). An image that is not square is padded with black first.
    Whatever is wrong is a UserError.
    """
    if path == "digits":
        return _fit(*_digits(), side, channels), None
    folder = _downloaded(path.removeprefix("hub:")) if path.startswith("hub:") else Path(path)
    if not folder.is_dir():
        raise UserError(f"no images at '{path}'; give a folder with idx files or a folder for each class, or 'digits'")
    for place in (folder, folder / "raw", folder / "MNIST" / "raw"):
        if pair := _idx_pair(place, "train"):
            tested = _idx_pair(place, "t10k") or _idx_pair(place, "test")
            return _fit(*_idx(*pair), side, channels), tested and _fit(*_idx(*tested), side, channels)
    if tables := sorted(folder.rglob("*.parquet")):
        mine, others = ([t for t in tables if _split(t.name) == split] for split in ("train", "test"))
        if not mine:
            raise UserError(f"'{path}' has Parquet files and none is called train...; rename the one to train on")
        return _fit(*_parquet(mine), side, channels), _fit(*_parquet(others), side, channels) if others else None
    if not (folder / "train").is_dir():
        return _fit(*_classes(folder), side, channels), None
    test = next((folder / name for name in _TEST if (folder / name).is_dir()), None)
    return _fit(*_classes(folder / "train"), side, channels), _fit(*_classes(test), side, channels) if test else None


def _fit(pixels: Sequence[np.ndarray] | np.ndarray, labels: list[str], side: int, channels: int) -> Labelled:
    if isinstance(pixels, np.ndarray) and pixels.shape[1:] == (side, side) and channels == 1:
        return Labelled(pixels[:, None], labels)
    fitted = np.empty((len(pixels), channels, side, side), np.uint8)
    for place, each in enumerate(pixels):
        image = Image.fromarray(each).convert("L" if channels == 1 else "RGB")
        longest = max(image.size)
        if image.size != (longest, longest):
            square = Image.new(image.mode, (longest, longest))
            square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
            image = square
        if longest != side:
            image = image.resize((side, side), Image.Resampling.BILINEAR)
        fitted[place] = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)[:channels]
    return Labelled(fitted, labels)


def _digits() -> tuple[np.ndarray, list[str]]:
    # The file alone is read: importing the package takes a second and wants more packages.
    found = find_spec("sklearn")
    places = [] if found is None else list(found.submodule_search_locations or [])
    files = [Path(place) / "datasets" / "data" / "digits.csv.gz" for place in places]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError("the digits come with scikit-learn: pip install 'stepladder[vision]'")
    table = np.loadtxt(file, delimiter=",")
    pixels = np.rint(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return pixels, [str(int(label)) for label in table[:, 64]]


def _idx_pair(folder: Path, split: str) -> tuple[Path, Path] | None:
    """The files of images and of labels of a split, if both are there."""
    stems = (f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte")
    pair = [
        next((folder / f"{s}{end}" for end in ("", ".gz") if (folder / f"{s}{end}").is_file()), None) for s in stems
    ]
    return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])


def _idx(images: Path, labels: Path) -> tuple[np.ndarray, list[str]]:
    pixels, names = idx(images), idx(labels)
    if pixels.ndim != 3 or names.shape != pixels.shape[:1]:
        raise UserError(f"{images} has shape {pixels.shape} and {labels} {names.shape}; they are no images with labels")
    return pixels, [str(name) for name in names.tolist()]


def idx(path: Path) -> np.ndarray:
    """The array of uint8 in an idx file (LeCun's format), also gzipped; a damaged or other file is a UserError."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); get it anew") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise UserError(f"{path} is no idx file of bytes; get it anew")
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i]) for i in range(data[3])]
    if len(data) - 4 - 4 * data[3] != int(np.prod(shape)):
        raise UserError(f"{path} is cut off or has something appended: its head says {shape}; get it anew")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _classes(folder: Path) -> tuple[list[np.ndarray], list[str]]:
    """Images under ``folder/CLASS/``, in the order of classes and names."""
    pixels, labels = [], []
    for place in sorted(p for p in folder.iterdir() if p.is_dir()):
        for file in sorted(f for f in place.rglob("*") if f.suffix.lower() in ENDINGS):
            pixels.append(_image(file, str(file)))
            labels.append(place.name)
    if not pixels:
        raise UserError(f"'{folder}' has no images; it needs a folder for each class, with {', '.join(ENDINGS[:3])}")
    return pixels, labels


def _image(file: Path | io.BytesIO, name: str) -> np.ndarray:
    try:
        with Image.open(file) as image:
            plain = "L" if image.mode in ("1", "L") else "RGB"
            return np.asarray(image.convert(plain))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"'{name}' is no image that can be read ({error}); replace or remove it") from error


def _split(name: str) -> str:
    found = re.match(r"[a-z]+", name)
    word = found[0] if found else ""
    return "test" if word in _TEST else word


def _parquet(files: list[Path]) -> tuple[list[np.ndarray], list[str]]:
    """Rows as the hub has them: an image as {bytes: ...} and a label, a number or a text."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("images in Parquet need pyarrow: pip install 'stepladder[hf]'") from error
    pixels, labels = [], []
    for file in files:
        table = parquet.read_table(file)
        columns = {name: next((c for c in table.column_names if c in names), None) for name, names in _COLUMNS.items()}
        if None in columns.values():
            raise UserError(f"{file} has the columns {', '.join(table.column_names)}; it needs an image and a label")
        names = _names(table.schema.metadata or {}, str(columns["label"]))
        for number, row in enumerate(_rows(table, columns)):
            data = row[0].get("bytes") if isinstance(row[0], dict) else None
            if not isinstance(data, bytes):
                raise UserError(f"{file}, row {number}: the image has no bytes; the files must hold the images")
            pixels.append(_image(io.BytesIO(data), f"{file}, row {number}"))
            labels.append(names[row[1]] if isinstance(row[1], int) and 0 <= row[1] < len(names) else str(row[1]))
    return pixels, labels


_COLUMNS = {"image": ("image", "img"), "label": ("label", "labels", "fine_label")}


def _rows(table: Any, columns: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    return zip(table[columns["image"]].to_pylist(), table[columns["label"]].to_pylist(), strict=True)


def _names(metadata: dict[bytes, bytes], column: str) -> list[str]:
    """The names of classes, where the file tells them; else numbers stay numbers."""
    try:
        return list(json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"])
    except (KeyError, TypeError, ValueError):
        return []


def _downloaded(repo: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError("a dataset of the hub needs huggingface_hub: pip install 'stepladder[hf]'") from error
    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=["*.parquet"]))
    except Exception as error:  # the client's many kinds and its HTTP library's: all in the way, none ours
        reason = " ".join(str(redact(str(error))).split())
        raise UserError(f"the dataset '{repo}' cannot be had from the hub: {reason}") from error
