"""Texts as documents: read from files by fixed, counted rules, and split so that training never sees validation.

Sources: ``pydoc`` (the help topics of Python's standard library, so a few hundred kilobytes of prose without any
download; its text belongs to the Python version), and files ``.txt`` or ``.jsonl``, each also with ``.gz``.

- ``.jsonl``: one JSON object a line, its ``text`` is a document. Blank lines are skipped.
- ``.txt``: a form feed ends a document; otherwise whole paragraphs (ended by a blank line) are gathered into documents
  of at most 10,000 characters. A longer paragraph is cut after a line, a longer line after a space, a longer word hard.
- Bytes that are no UTF-8 and lone surrogates become U+FFFD, CRLF and CR become LF, NUL is dropped, documents of nothing
  but white space are dropped, a byte-order mark at the start is dropped, and white space around a document is
  trimmed (not the indent of its first line). The manifest of the tokens counts each.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics
from typing import IO, Any, cast

import numpy as np

from stepladder.core.config import digest
from stepladder.core.errors import UserError
from stepladder.core.keys import hash64

PYDOC = "pydoc"
RULES = 1  # raise with every change of the rules: cached tokens then go out of use
_LIMIT = 10_000  # characters in a document of a .txt file
HELD_OUT = 16
"""One document in so many is for validation: those whose ``hash64`` of the normalised text it divides."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_REPLACED = "\ufffd"
_MARK = b"\xef\xbb\xbf"  # a byte-order mark


@dataclass(frozen=True)
class Scan:
    """What a walk over a whole corpus finds.

    ``documents`` and ``characters`` by split; ``counts`` of the reading rules applied; ``duplicates``: training
    documents that, but for case and white space, came before; ``overlap``: validation documents that are in the
    training split, exactly or but for case and white space (0 by construction unless a validation file is given).
    ``sides``: which documents of a file without a validation file are for validation, bool.
    """

    documents: dict[str, int]
    characters: dict[str, int]
    counts: dict[str, int]
    duplicates: int
    overlap: dict[str, int]
    sides: np.ndarray


class Corpus:
    """The documents of a source in two splits, "train" and "valid", always in the same order.

    With a ``valid`` file the splits are the two files. Without one, a document is for validation if the hash of its
    normalised text (lower case, white space collapsed) falls into one bucket of sixteen: copies of a document stay
    together. Should a split get nothing, one document moves there. ``origin``: where documents come from that were
    taken from elsewhere (see data.published), for the run's records.
    """

    def __init__(self, path: str, valid: str | None = None, origin: dict[str, Any] | None = None) -> None:
        self.path, self.valid, self.origin = path, valid, origin or {}
        self.digest = digest({"rules": RULES, "train": content(path), "valid": valid and content(valid)})

    def documents(self, split: str) -> Iterator[str]:
        """The documents of "train" or "valid", read anew at every call."""
        path = self.valid if self.valid and split == "valid" else self.path
        texts = read_documents(path, Counter())
        if self.valid:
            return texts
        wanted = (self.scan.sides == (split == "valid")).tolist()
        return itertools.compress(texts, wanted)

    def characters(self, split: str) -> int:
        """How many characters ``documents`` gives."""
        return self.scan.characters[split]

    def count(self, split: str) -> int:
        """How many documents that are."""
        return self.scan.documents[split]

    @cached_property
    def scan(self) -> Scan:
        """One walk over everything; raises UserError if there is no document for a split."""
        counts: Counter[str] = Counter()
        train = _walk(self.path, counts)
        sides = np.zeros(0, dtype=bool)
        if self.valid:
            valid = _walk(self.valid, counts)
        else:
            sides = self._sides(train.normalised)
            train, valid = train.take(~sides), train.take(sides)
        return Scan(
            documents={"train": len(train.exact), "valid": len(valid.exact)},
            characters={"train": int(train.sizes.sum()), "valid": int(valid.sizes.sum())},
            counts=dict(sorted(counts.items())),
            duplicates=len(train.normalised) - len(np.unique(train.normalised)),
            overlap={
                "exact": int(np.isin(valid.exact, train.exact).sum()),
                "normalised": int(np.isin(valid.normalised, train.normalised).sum()),
            },
            sides=sides,
        )

    def _sides(self, hashes: np.ndarray) -> np.ndarray:
        """Which documents are for validation: neither none nor all."""
        different = np.unique(hashes)
        if len(different) < 2:
            raise UserError(
                f"text source '{self.path}' has a single document, none is left for validation;"
                " give a file of its own as 'valid'"
            )
        sides = hashes % HELD_OUT == 0
        if not sides.any():
            return hashes == different[0]
        return hashes != different[-1] if sides.all() else sides


@dataclass(frozen=True)
class _Walk:
    """Hashes and sizes of documents, in order."""

    exact: np.ndarray
    normalised: np.ndarray
    sizes: np.ndarray

    def take(self, rows: np.ndarray) -> _Walk:
        return _Walk(self.exact[rows], self.normalised[rows], self.sizes[rows])


def _walk(path: str, counts: Counter[str]) -> _Walk:
    found = [(hash64(t), hash64(normalise(t)), len(t)) for t in read_documents(path, counts)]
    if not found:
        raise UserError(f"text source '{path}' has no document with any text in it; give another file")
    exact, normalised, sizes = zip(*found, strict=True)
    return _Walk(np.array(exact, np.uint64), np.array(normalised, np.uint64), np.array(sizes, np.int64))


def source_name(path: str) -> str:
    """A file's name without folders and endings; "pydoc" for the built-in source."""
    return Path(path).name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".txt")


def normalise(text: str) -> str:
    """A document without its accidents: lower case, every run of white space one space."""
    return " ".join(text.casefold().split())


def content(path: str) -> str:
    """SHA-256 of what is behind a path."""
    if path == PYDOC:
        return digest(topics)
    with _open(path) as handle:
        return hashlib.file_digest(cast("Any", handle), "sha256").hexdigest()


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked if it ends in .gz; whatever goes wrong on the way is a UserError that names the file."""
    if not path.removesuffix(".gz").endswith((".txt", ".jsonl")):
        raise UserError(f"text source '{path}' must be 'pydoc' or end in .txt, .jsonl, .txt.gz or .jsonl.gz")
    try:
        with cast("IO[bytes]", gzip.open(path) if path.endswith(".gz") else open(path, "rb")) as handle:
            yield handle
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"source '{path}' cannot be read: {reason}; give the path of a sound file") from error


def read_documents(path: str, counts: Counter[str]) -> Iterator[str]:
    """The documents of one source by the rules above; ``counts`` tallies each rule that was applied."""
    if path == PYDOC:
        pieces: Iterable[str] = (clean(topics[name], counts) for name in sorted(topics))
        yield from trimmed(pieces, counts)
        return
    with _open(path) as handle:
        if path.removesuffix(".gz").endswith(".jsonl"):
            pieces = _jsonl(handle, path, counts)
        else:
            pieces = _paragraphs(_lines(handle, counts))
        yield from trimmed(pieces, counts)


def read_lines(path: str, counts: Counter[str]) -> Iterator[str]:
    """The lines of a .txt or .txt.gz file, without their ends."""
    with _open(path) as handle:
        for line in _lines(handle, counts):
            yield line.rstrip("\n")


def trimmed(pieces: Iterable[str], counts: Counter[str]) -> Iterator[str]:
    """Pieces of clean text as documents: without white space around them, and without those that are nothing but it."""
    for piece in pieces:
        if piece.strip():
            indent = len(piece) - len(piece.lstrip())  # of the first line with text, that line's own is kept
            yield piece[piece.rfind("\n", 0, indent) + 1 :].rstrip()
        else:
            counts["empty_documents"] += 1


def clean(raw: bytes | str, counts: Counter[str]) -> str:
    """Valid text by the rules of this module."""
    if isinstance(raw, bytes):
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = raw.decode(errors="replace")
            counts["invalid_utf8"] += text.count(_REPLACED) - raw.count(_REPLACED.encode())
    else:
        text, found = _SURROGATE.subn(_REPLACED, raw) if not raw.isascii() else (raw, 0)
        if found:
            counts["surrogates"] += found
    if "\r" in text:
        counts["carriage_returns"] += text.count("\r")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        counts["nul"] += text.count("\0")
        text = text.replace("\0", "")
    return text


def _lines(handle: IO[bytes], counts: Counter[str]) -> Iterator[str]:
    for number, line in enumerate(handle):
        if number == 0 and line.startswith(_MARK):
            counts["byte_order_marks"] += 1
            line = line[3:]
        yield clean(line, counts)


def _jsonl(handle: IO[bytes], path: str, counts: Counter[str]) -> Iterator[str]:
    for number, entry in _objects(handle, path, counts):
        text = entry.get("text")
        if not isinstance(text, str):
            raise UserError(f"text source '{path}', line {number}: must be an object with a 'text' that is a string")
        yield clean(text, counts)


def _objects(handle: IO[bytes], path: str, counts: Counter[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with the number of its line."""
    for number, line in enumerate(_lines(handle, counts), start=1):
        if line.strip():
            yield number, _object(line, path, number)


def _object(line: str, path: str, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"text source '{path}', line {number}: not JSON ({error})") from error
    return entry if isinstance(entry, dict) else {}


def read_rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl or .jsonl.gz file, each with the number of its line; what is no object counts as {}."""
    _of_lines(path)
    with _open(path) as handle:
        yield from _objects(handle, path, Counter())


def read_placed(path: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """``read_rows``, and between number and object the byte, of what is unpacked, at which the line begins."""
    _of_lines(path)
    with _open(path) as handle:
        place = 0
        for number, line in enumerate(handle, start=1):
            text = _placed(line, place)
            if text.strip():
                yield number, place, _object(text, path, number)
            place += len(line)


def read_at(path: str, places: Iterable[tuple[int, int]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects at some ``places``, (number, byte) of ``read_placed`` in rising order, each with its number."""
    with _open(path) as handle:
        for number, place in places:
            handle.seek(place)
            yield number, _object(_placed(handle.readline(), place), path, number)


def _placed(line: bytes, place: int) -> str:
    return clean(line if place else line.removeprefix(_MARK), Counter())


def _of_lines(path: str) -> None:
    if not path.removesuffix(".gz").endswith(".jsonl"):
        raise UserError(f"source '{path}' must end in .jsonl or .jsonl.gz")


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Whole paragraphs gathered into documents of at most _LIMIT characters."""
    held: list[str] = []
    size = whole = 0  # characters held; lines held up to the end of the last whole paragraph
    for line in lines:
        for section, text in enumerate(line.split("\f")):
            if section and held:  # a form feed came before this text
                yield "".join(held)
                held, size, whole = [], 0, 0
            for piece in _cut(text):
                while held and size + len(piece) > _LIMIT:
                    end = whole or len(held)
                    yield "".join(held[:end])
                    held, whole = held[end:], 0
                    size = sum(map(len, held))
                blank = not piece.strip()
                if held or not blank:
                    held.append(piece)
                    size += len(piece)
                whole = len(held) if blank else whole
    if held:
        yield "".join(held)


def _cut(text: str) -> Iterator[str]:
    """A line in pieces of at most _LIMIT characters (a carriage return in it has become the end of a line)."""
    start = 0
    while len(text) - start > _LIMIT:
        stop = start + _LIMIT
        end = max(text.rfind("\n", start, stop), -1) + 1 or text.rfind(" ", start, stop) + 1 or stop
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
