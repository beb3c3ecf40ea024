"""Rows of pairs: the tokens of all training pairs in the cache, mapped from disk, and which of them make up a row.

A folder of the cache holds ``tokens.bin`` (uint16 or uint32, little endian; every pair is BOS question answer EOS, in
the order of the file), ``starts.bin`` (int64 [n + 1]: where each pair starts, and the end) and ``answers.bin`` (int32:
how many tokens of it are scored), with ``pairs.json`` and ``manifest.json``. It is shared by runs of any seed and row
length: the order is a keyed permutation, and of a row only the number of its first pair is kept in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stepladder.core.config import digest
from stepladder.core.errors import UserError
from stepladder.core.files import read_json, verify_manifest, write_json
from stepladder.core.keys import Key, permute
from stepladder.data.pairs import Pair, Pairs, Shelf
from stepladder.data.shards import SMALL, build_once, mapped, whole
from stepladder.data.tokenizers import BOS, EOS, IGNORE, PAD, Tokenizer

_FORMAT = 1
_READ = 1 << 20  # characters encoded at a time
_CHUNK = 1 << 18  # pairs put into rows at a time


@dataclass(frozen=True)
class Packed:
    """Pairs in rows of ``length`` tokens at most, one row after the other, in the order that ``secret`` permutes.

    ``tokens`` [N], ``starts`` [n + 1], ``answers`` [n]: see above. ``first`` [R + 1]: the place in that order of the
    first pair of each row, and n.
    """

    tokens: np.ndarray
    starts: np.ndarray
    answers: np.ndarray
    first: np.ndarray
    length: int
    secret: Key

    @property
    def windows(self) -> int:
        """How many rows there are."""
        return len(self.first) - 1

    def rows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows ``numbers`` [B]: int64 (tokens, targets, documents), each ``[B, length]``, as ``packing.pack``."""
        begin, counts = self.first[numbers], self.first[numbers + 1] - self.first[numbers]
        row = np.repeat(np.arange(len(numbers)), counts)
        place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        pairs = permute(self.secret, len(self.answers), np.repeat(begin, counts) + place)
        starts, sizes = self.starts[pairs], self.starts[pairs + 1] - self.starts[pairs]
        ends = np.cumsum(sizes)  # among all tokens of these rows
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - sizes, sizes)
        row_start = (ends - sizes)[np.cumsum(counts) - counts]
        rows = np.repeat(row, sizes)
        columns = np.arange(len(rows)) - row_start[rows]
        wide = np.full((len(numbers), self.length + 1), PAD, np.int64)
        wide[rows, columns] = found = self.tokens[np.repeat(starts, sizes) + within].astype(np.int64)
        targets = np.full(wide.shape, IGNORE, np.int64)
        targets[rows, columns] = np.where(within >= np.repeat(sizes - self.answers[pairs], sizes), found, IGNORE)
        used = np.bincount(row, sizes, len(numbers)).astype(np.int64)
        begins = (wide == BOS) | (np.arange(self.length + 1) == used[:, None])
        return wide[:, :-1], targets[:, 1:], np.cumsum(begins[:, :-1], axis=1) - 1


def packed(pairs: Pairs, tokenizer: Tokenizer, length: int, secret: Key, cache: Path) -> Packed:
    """All training pairs, once each, in rows: in an order of ``secret``, a row ends where the next pair does not fit.

    Their tokens are made unless the cache has them. A pair longer than a row is a UserError, never cut or skipped.
    """
    what = {"format": _FORMAT, "pairs": pairs.digest, "tokenizer": tokenizer.fingerprint}
    folder = cache / f"pairs-{digest(what)[:32]}"
    build_once(folder, lambda temporary: _build(pairs.train, tokenizer, temporary))
    with whole(folder):
        if sum(path.stat().st_size for path in folder.iterdir()) < SMALL:
            verify_manifest(folder)
        about = read_json(folder / "pairs.json")
        tokens = mapped(folder / "tokens.bin", about["dtype"], about["tokens"])
        starts = mapped(folder / "starts.bin", "<i8", about["pairs"] + 1)
        answers = mapped(folder / "answers.bin", "<i4", about["pairs"])
        if len(answers) != len(pairs.train) or starts[-1] != len(tokens):
            raise UserError(f"{folder}: has {len(answers)} pairs, not the {len(pairs.train)} of the file")
    if about["longest"] > length:
        (pair,) = pairs.train.take(np.array([about["longest_pair"]]))
        raise UserError(
            f"pairs {pair.place}: {about['longest']} tokens do not fit into rows of {length};"
            f" set data.sequence to at least {about['longest']}, or leave long pairs out"
        )
    return Packed(tokens, starts, answers, _first(starts, length, secret), length, secret)


def _first(starts: np.ndarray, length: int, secret: Key) -> np.ndarray:
    """The places of the first pairs of all rows, and the end."""
    count, found, used = len(starts) - 1, [0], 0  # used: tokens of the open row
    for chunk in range(0, count, _CHUNK):
        pairs = permute(secret, count, np.arange(chunk, min(chunk + _CHUNK, count)))
        ends = np.cumsum(starts[pairs + 1] - starts[pairs]) + used
        begin = 0
        while (place := int(np.searchsorted(ends, begin + length, side="right"))) < len(ends):
            found.append(chunk + place)
            begin = int(ends[place - 1]) if place else used
        used = int(ends[-1]) - begin
    return np.array([*found, count])


def _build(shelf: Shelf, tokenizer: Tokenizer, folder: Path) -> None:
    dtype = "<u2" if tokenizer.vocab <= 1 << 16 else "<u4"
    total = count = longest = longest_pair = 0
    with (
        open(folder / "tokens.bin", "wb") as tokens,
        open(folder / "starts.bin", "wb") as starts,
        open(folder / "answers.bin", "wb") as answers,
    ):
        for block in _blocks(shelf):
            asked = tokenizer.encode_all([pair.question for pair in block])
            given = tokenizer.encode_all([pair.answer for pair in block])
            parts = [part for q, a in zip(asked, given, strict=True) for part in ([BOS], q, a, [EOS])]
            tokens.write(np.concatenate(parts).astype(dtype).tobytes())
            scored = np.array([len(ids) + 1 for ids in given])
            sizes = np.array([len(ids) + 1 for ids in asked]) + scored
            starts.write((total + np.cumsum(sizes) - sizes).astype("<i8").tobytes())
            answers.write(scored.astype("<i4").tobytes())
            if sizes.max() > longest:
                longest, longest_pair = int(sizes.max()), count + int(sizes.argmax())
            total, count = total + int(sizes.sum()), count + len(block)
        starts.write(np.array([total], "<i8").tobytes())
    about = {"tokens": total, "pairs": count, "longest": longest, "longest_pair": longest_pair}
    write_json(folder / "pairs.json", {"format": _FORMAT, "dtype": dtype, **about})


def _blocks(shelf: Shelf) -> Iterator[list[Pair]]:
    block: list[Pair] = []
    characters = 0
    for pair in shelf:
        block.append(pair)
        characters += len(pair.question) + len(pair.answer)
        if characters >= _READ:
            yield block
            block, characters = [], 0
    if block:
        yield block
