"""The cache: what is learned from a corpus and its tokens, made once, checked at every opening, read from any place.

A folder of the cache holds, for each split, ``<split>.tokens.bin`` (uint16 or uint32, little endian; every document is
BOS ... EOS) and ``<split>.documents.bin`` (int64: where each document starts, and the end), with ``shard.json`` (what
was encoded and how, counts of every reading rule) and ``manifest.json`` (SHA-256 of each file). Its name is the digest
of the text and the tokenizer; it appears by one rename, so of two builders one wins and nobody sees half of it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stepladder.core.config import digest
from stepladder.core.errors import UserError
from stepladder.core.files import publish_dir, read_json, verify_manifest, write_json, write_manifest
from stepladder.data.corpora import Corpus, source_name
from stepladder.data.tokenizers import BOS, EOS, IGNORE, PAD, CharTokenizer, Tokenizer, TokenizerConfig, from_json

FORMAT = 1
SPLITS = ("train", "valid")
SMALL = 256 << 20  # bytes of a folder that is checked in full at every opening (under a second)
_BATCH = 1 << 20  # characters encoded at once


@dataclass(frozen=True)
class Shard:
    """The tokens of one split, read lazily from disk: ``tokens`` [N] and ``starts`` int64 [documents + 1]."""

    tokens: np.ndarray
    starts: np.ndarray

    def windows(self, length: int) -> int:
        """How many windows of ``length`` positions cover all tokens; the last may be part padding."""
        return -(-(len(self.tokens) - 1) // length)

    def rows(self, numbers: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The windows ``numbers`` [B]: int64 (tokens, targets, documents), each ``[B, length]``.

        Window w reads tokens ``w * length`` onwards and predicts each one's successor, so over all windows every
        token but the first of a document is predicted once. The successor of a document's end is IGNORE. Documents
        are numbered from 0 in each row; padding is a document of its own.
        """
        places = np.asarray(numbers, dtype=np.int64)[:, None] * length + np.arange(length + 1)
        beyond = places >= len(self.tokens)
        wide = self.tokens[np.where(beyond, 0, places)].astype(np.int64)
        starts = wide == BOS  # no text encodes to BOS, so it marks a document
        if beyond.any():
            wide[beyond] = PAD
            starts = np.where(beyond, np.diff(beyond, axis=1, prepend=False), starts)
        starts[:, 0] = False
        targets = np.where(starts[:, 1:] | beyond[:, 1:], IGNORE, wide[:, 1:])
        return wide[:, :-1], targets, np.cumsum(starts[:, :-1], axis=1)


@dataclass(frozen=True)
class Shards:
    """Both splits of a source and ``about``, the content of shard.json."""

    train: Shard
    valid: Shard
    about: dict[str, Any]


def prepare(corpus: Corpus, tokenizer: Tokenizer, cache: Path) -> Shards:
    """The tokens of a corpus: built if the cache has none, then opened with all checks."""
    folder = shard_folder(corpus, tokenizer, cache)
    build_once(folder, lambda temporary: _build(corpus, tokenizer, temporary))
    return open_shards(folder, tokenizer)


class Learnable(Protocol):
    """What a tokenizer can be learned from: a Corpus, or Pairs."""

    digest: str

    def documents(self, split: str) -> Iterator[str]:
        """The texts of "train" or "valid"."""

    def characters(self, split: str) -> int:
        """How many characters these have."""

    def count(self, split: str) -> int:
        """How many these are."""


def learn(config: TokenizerConfig, alphabet: str, corpora: Sequence[Learnable], cache: Path) -> Tokenizer:
    """The tokenizer that a configuration describes, given every character of the tasks and the texts.

    One that reads text is learned from training documents, evenly spread over them, and kept in the cache.
    """
    characters, documents = config.reads()
    if not characters:
        return config.build(alphabet, ())
    what = {"tokenizer": config.model_dump(), "alphabet": alphabet, "texts": [corpus.digest for corpus in corpora]}
    folder = cache / f"tokenizer-{digest(what)[:32]}"

    def build(temporary: Path) -> None:
        shares = [
            sum(corpus.characters("train") for corpus in corpora) / characters,
            sum(corpus.count("train") for corpus in corpora) / documents,
        ]
        texts = itertools.chain.from_iterable(corpus.documents("train") for corpus in corpora)
        sample = itertools.islice(texts, 0, None, math.ceil(max(1.0, *shares)))
        tokenizer = config.build(alphabet, _within(sample, characters))
        (temporary / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")

    build_once(folder, build)
    with whole(folder):
        verify_manifest(folder)
        return from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))


def _within(texts: Iterable[str], characters: float) -> Iterator[str]:
    """Texts of so many characters together; the last is cut."""
    for text in texts:
        if len(text) >= characters:
            yield text[: int(characters)]
            return
        characters -= len(text)
        yield text


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """A folder of the cache, filled by ``build`` unless it is there.

    It is built under another name beside its place and moved there, manifest and all, in one step; if somebody else was
    faster, theirs stays. A failure leaves nothing behind.
    """
    if folder.exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.parent / f".building-{secrets.token_hex(8)}"
        temporary.mkdir()
        try:
            build(temporary)
            write_manifest(temporary)
            publish_dir(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write the cache '{folder.parent}': {error.strerror or error};"
            " free some space or choose another cache folder"
        ) from error


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[None]:
    """Whatever is found wrong with a folder of the cache is a UserError that names it and the way out."""
    try:
        yield
    except (UserError, OSError, KeyError, TypeError) as error:
        problem = str(error) if isinstance(error, UserError) else f"{folder}: {error!r}"
        raise UserError(f"damaged cache: {problem}; delete the folder '{folder}', it is built anew") from error


def shard_folder(corpus: Corpus, tokenizer: Tokenizer, cache: Path) -> Path:
    """Where the cache keeps the tokens of this text in this tokenizer."""
    return cache / digest({"format": FORMAT, "text": corpus.digest, "tokenizer": tokenizer.fingerprint})[:32]


def open_shards(folder: Path, tokenizer: Tokenizer, verify: bool | None = None) -> Shards:
    """Open a folder of tokens; whatever is wrong with it is a UserError that names the file and the way out.

    Sizes, the tokenizer's fingerprint and the largest id are checked always; every byte and every id if the folder
    has less than 256 MB or ``verify`` is true.
    """
    with whole(folder):
        if verify is None:
            verify = sum(path.stat().st_size for path in folder.iterdir()) < SMALL
        if verify:
            verify_manifest(folder)
        about = read_json(folder / "shard.json")
        if about["format"] != FORMAT:
            raise UserError(f"{folder}: format {about['format']} is not {FORMAT}")
        train, valid = (_open_split(folder, split, about, verify) for split in SPLITS)
    if about["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"the tokens in '{folder}' were made by tokenizer {about['tokenizer'][:12]}, not by this run's"
            f" {tokenizer.kind} tokenizer {tokenizer.fingerprint[:12]}; use that one, or another cache folder"
        )
    return Shards(train, valid, about)


def _open_split(folder: Path, split: str, about: dict[str, Any], verify: bool) -> Shard:
    counts = about["splits"][split]
    tokens = mapped(folder / f"{split}.tokens.bin", about["dtype"], counts["tokens"])
    starts = mapped(folder / f"{split}.documents.bin", "<i8", counts["documents"] + 1)
    largest = int(tokens.max()) if verify else counts["largest"]
    if largest >= about["vocab"]:
        raise UserError(f"{folder / f'{split}.tokens.bin'}: id {largest} is outside the vocabulary of {about['vocab']}")
    if starts[0] != 0 or starts[-1] != len(tokens):
        raise UserError(f"{folder / f'{split}.documents.bin'}: does not span the tokens")
    if verify and not ((np.diff(starts) > 0).all() and (tokens[starts[:-1]] == BOS).all()):
        raise UserError(f"{folder / f'{split}.documents.bin'}: a document does not start at its BOS")
    return Shard(tokens, starts)


def mapped(path: Path, dtype: str, count: int) -> np.ndarray:
    """The numbers [count] of a file of the cache, read lazily from disk; a file of another size is a UserError."""
    expected, size = count * np.dtype(dtype).itemsize, path.stat().st_size
    if size != expected:
        raise UserError(f"{path}: has {size} bytes, not the {expected} that were written")
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _build(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    dtype = "<u2" if tokenizer.vocab <= 1 << 16 else "<u4"
    scan = corpus.scan
    about = {
        "format": FORMAT,
        "source": source_name(corpus.path),
        "text": corpus.digest,
        "tokenizer": tokenizer.fingerprint,
        "vocab": tokenizer.vocab,
        "dtype": dtype,
        "rules": scan.counts,
        "duplicates": scan.duplicates,
        "overlap": scan.overlap,
        "splits": {split: _write_split(corpus, split, tokenizer, dtype, folder) for split in SPLITS},
    }
    if Corpus(corpus.path, corpus.valid).digest != corpus.digest:
        raise UserError(f"text source '{corpus.path}' was changed while it was read; start again")
    write_json(folder / "shard.json", about)


def _write_split(corpus: Corpus, split: str, tokenizer: Tokenizer, dtype: str, folder: Path) -> dict[str, int]:
    lengths: list[int] = []
    histogram = np.zeros(tokenizer.vocab, dtype=np.int64)
    with open(folder / f"{split}.tokens.bin", "wb") as out:
        for texts in _grouped(corpus.documents(split)):
            documents = tokenizer.encode_all(texts)
            whole = np.concatenate([part for ids in documents for part in ([BOS], ids, [EOS])]).astype(dtype)
            out.write(whole.tobytes())
            lengths += [len(ids) + 2 for ids in documents]
            histogram += np.bincount(whole, minlength=tokenizer.vocab)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    (folder / f"{split}.documents.bin").write_bytes(starts.tobytes())
    has_unknown = isinstance(tokenizer, CharTokenizer) and tokenizer.unknown
    return {
        "documents": len(lengths),
        "tokens": int(starts[-1]),
        "bytes": int(histogram @ tokenizer.byte_counts(np.arange(tokenizer.vocab))),
        "largest": int(np.flatnonzero(histogram)[-1]),
        "unknown": int(histogram[CharTokenizer.unknown_id]) if has_unknown else 0,
    }


def _grouped(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _BATCH:
            yield group
            group, size = [], 0
    if group:
        yield group
