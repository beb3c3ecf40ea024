"""The training stream: batch ``step`` is a pure function of (configuration, seed, step). There is no state at all.

So resuming at step k means asking for step k, a rank takes its rows by arithmetic, and every rung of a ladder sees the
same data. A row comes whole from one source, drawn by the weights of the mixture at its step.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, model_validator

from stepladder.core.config import Config, Field, chosen, digest
from stepladder.core.errors import UserError
from stepladder.core.keys import Key, key, unit
from stepladder.data.base import overlap
from stepladder.data.packing import pack, probe
from stepladder.data.pairrows import Packed, packed
from stepladder.data.shards import Learnable, Shards, learn, prepare
from stepladder.data.sources import (
    AnySource,
    Illustrated,
    PairSource,
    Rows,
    Shown,
    TaskSource,
    Texts,
    shuffled,
)
from stepladder.data.tokenizers import IGNORE, PAD, TOKENIZERS, ByteConfig, Tokenizer, TokenizerConfig

WHERE = {"path", "valid", "revision", "streaming"}
"""Fields of a source that say where its content comes from; the content itself decides."""
OVERLAP_ITEMS = 2000
"""Questions of each split that a task's overlap is measured on."""


class DataConfig(Config):
    """What a run reads: a tokenizer, the length of a row, and a mixture of sources."""

    tokenizer: Annotated[TokenizerConfig, BeforeValidator(chosen(TOKENIZERS, "tokenizer"))] = ByteConfig()
    sequence: int = Field(128, ge=4, le=1 << 24, description="tokens in a row (T)")
    sources: tuple[AnySource, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _possible(self) -> DataConfig:
        points = {0} | {step for s in self.sources if isinstance(s.weight, tuple) for step, _ in s.weight}
        for step in sorted(points):  # the sum is linear between the points, so it is positive everywhere
            if sum(source.share(step) for source in self.sources) <= 0:
                raise ValueError(f"sources: all weights are 0 at step {step}; give one of them more")
        texts = [source.label for source in self.sources if isinstance(source, Texts)]
        if texts and self.tokenizer.kind == "alphabet":
            raise ValueError(
                f"tokenizer 'alphabet' knows the tasks' characters only, not those of '{texts[0]}';"
                " use 'byte', 'char' or 'bpe'"
            )
        if self.tokenizer.kind == "bpe" and not any(isinstance(s, Texts | PairSource) for s in self.sources):
            raise ValueError("tokenizer 'bpe' learns from text and there is no text source; use 'alphabet' or 'byte'")
        return self

    def names(self) -> tuple[str, ...]:
        """A name for every source: its label; a repeated one gets ``#2``, ``#3``, ..."""
        seen: Counter[str] = Counter()
        names = []
        for source in self.sources:
            seen[source.label] += 1
            names.append(source.label if seen[source.label] == 1 else f"{source.label}#{seen[source.label]}")
        return tuple(names)


@dataclass(frozen=True)
class Batch:
    """Rows of T tokens, int64 ``[B, T]``.

    ``targets``: what comes next in the same document, IGNORE where nothing is asked. ``documents``: runs of equal ids,
    from 0 in every row; padding is a run too. ``source`` [B]: the place of each row's source in the configuration.
    ``images``: None if no source of the run has any; rows without are blank.
    """

    tokens: np.ndarray
    targets: np.ndarray
    documents: np.ndarray
    source: np.ndarray
    images: Shown | None = None


@dataclass(frozen=True)
class TextBatch:
    """Validation windows, int64 ``[B, T]`` as in Batch.

    ``bytes``: how many bytes of text each target stands for, 0 for IGNORE and EOS. ``index`` [B]: the window's number.
    """

    tokens: np.ndarray
    targets: np.ndarray
    documents: np.ndarray
    bytes: np.ndarray
    index: np.ndarray


class Stream:
    """All the data of a run: training batches by step, validation text from front to back.

    ``cache`` is the folder where tokens are kept. ``tokenizer`` replaces the configured one by that of a finished run.
    ``origins``: by source that was fetched, which revision of what it is.
    Raises UserError if anything is missing, damaged or does not fit.
    """

    def __init__(self, config: DataConfig, seed: int, cache: Path, tokenizer: Tokenizer | None = None) -> None:
        self.config, self.seed, self.names = config, seed, config.names()
        texts = {i: s.corpus(cache) for i, s in enumerate(config.sources) if isinstance(s, Texts)}
        tasks = [source.task for source in config.sources if isinstance(source, TaskSource)]
        self.pairs = {self.names[i]: s.pairs for i, s in enumerate(config.sources) if isinstance(s, PairSource)}
        characters = set().union(*(task.alphabet for task in tasks), *(s.alphabet() for s in config.sources))
        if config.tokenizer.kind == "alphabet":
            characters = characters.union(*(pairs.alphabet() for pairs in self.pairs.values()))
        read: list[Learnable] = [*texts.values(), *self.pairs.values()]
        self.tokenizer = tokenizer or learn(config.tokenizer, "".join(sorted(characters)), read, cache)
        self.texts = {self.names[i]: prepare(corpus, self.tokenizer, cache) for i, corpus in texts.items()}
        self.origins = {self.names[i]: corpus.origin for i, corpus in texts.items() if corpus.origin}
        self._rows: list[Rows] = []
        for name, source in zip(self.names, config.sources, strict=True):
            if isinstance(source, TaskSource):
                typical = probe(source.task, self.tokenizer, config.sequence)
                self._rows.append(_TaskRows(source, seed, self.tokenizer, config.sequence, typical))
            elif isinstance(source, PairSource):
                secret = key(seed, "data", "pairs", name)
                rows = packed(self.pairs[name], self.tokenizer, config.sequence, secret / "rows", cache)
                self._rows.append(_PairRows(rows, secret))
            elif isinstance(source, Texts):
                self._rows.append(_TextRows(self.texts[name], key(seed, "data", "text", name), config.sequence))
            else:
                self._rows.append(source.open(name, seed, self.tokenizer, config.sequence))

    def batch(self, step: int, rows: np.ndarray, batch_size: int) -> Batch:
        """The rows ``rows`` [B] (each in ``range(batch_size)``, any order) of the batch of ``batch_size`` at ``step``.

        Row i depends on (configuration, seed, step, rows[i], batch_size) only, so any division of the rows among ranks
        or micro-batches gives the same batch.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if step < 0 or (rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < batch_size):
            raise ValueError(f"rows must lie in 0..{batch_size - 1} and the step not be negative")
        numbers = step * batch_size + rows
        edges = np.cumsum(self._shares(step))
        luck = unit(key(self.seed, "data", "mixture").words(numbers, 1)[:, 0])
        chosen_source = np.searchsorted(edges[:-1], luck, side="right")
        shape = (len(rows), self.config.sequence)
        tokens, targets, documents = (np.empty(shape, dtype=np.int64) for _ in range(3))
        for i in np.unique(chosen_source):
            mine = chosen_source == i
            tokens[mine], targets[mine], documents[mine] = self._rows[i].rows(step, numbers[mine])
        return Batch(tokens, targets, documents, chosen_source, self._shown(step, numbers, chosen_source))

    def expand(self, params: int) -> None:
        """Make as many different images as a model of ``params`` parameters wants, where a source says a ratio."""
        self._rows = [rows.expanded(params) if isinstance(rows, Illustrated) else rows for rows in self._rows]

    def images(self) -> dict[str, Any]:
        """By source of images: how many there are, how often each is shown anew, tokens, and what was asked for."""
        named = zip(self.names, self._rows, strict=True)
        return {name: rows.about() for name, rows in named if isinstance(rows, Illustrated)}

    def images_per_row(self) -> float:
        """How many images an encoder is given with a row: as many as a row can have, in rows without any, too."""
        return float(max((rows.images for rows in self._rows if isinstance(rows, Illustrated)), default=0))

    def _shown(self, step: int, numbers: np.ndarray, chosen_source: np.ndarray) -> Shown | None:
        most = int(self.images_per_row())
        if not most:
            return None
        seen = next(rows for rows in self._rows if isinstance(rows, Illustrated) and rows.images)
        side, channels = seen.source.side, seen.source.channels
        pixels = np.zeros((len(numbers), most, channels, side, side), dtype=np.uint8)
        slots = np.full((len(numbers), self.config.sequence), -1, dtype=np.int64)
        for i in np.unique(chosen_source):
            rows = self._rows[i]
            if isinstance(rows, Illustrated) and rows.images:
                mine = chosen_source == i
                found = rows.shown(step, numbers[mine])
                pixels[mine, : rows.images], slots[mine] = found.pixels, found.slots
        return Shown(pixels, slots)

    def valid_text(self, rows: int = 32) -> dict[str, Iterator[TextBatch]]:
        """For every text source all its validation tokens, ``rows`` windows at a time (the last batch has fewer).

        Windows do not overlap, so each token but the first of a document is a target once, and ``bytes`` adds up to the
        bytes of the validation text.
        """
        return {name: self._windows(shards, rows) for name, shards in self.texts.items()}

    def describe(self, step: int) -> dict[str, Any]:
        """The mixture at a step: ``weights`` (share of the rows by source name) and ``sizes`` ([low, high] by task)."""
        sources = list(zip(self.names, self.config.sources, strict=True))
        return {
            "weights": dict(zip(self.names, self._shares(step).tolist(), strict=True)),
            "sizes": {name: list(source.sizes(step)) for name, source in sources if isinstance(source, TaskSource)},
        }

    def overlap(self) -> dict[str, dict[str, int]]:
        """By text source: how many validation ``documents`` there are, and how many of them are in the training split,
        ``exact`` and ``normalised`` (but for case and white space). By task source: how many of its first test
        questions are among as many of its training, ``exact``, ``normalised`` and ``canonical``; measured, never
        assumed, so a task that has no test items at some size of its training range has no entry. By group of pairs:
        how many held-out ``questions`` there are, and how many of them are in the training pairs. By source of
        images: how many ``images`` there are to test on, and how many of them are in the training images."""
        found = {
            name: {"documents": shards.about["splits"]["valid"]["documents"], **shards.about["overlap"]}
            for name, shards in self.texts.items()
        }
        for name, source in zip(self.names, self.config.sources, strict=True):
            if isinstance(source, TaskSource):
                try:
                    counts = overlap(source.task, self.seed, OVERLAP_ITEMS)
                except UserError:
                    continue
                found[name] = {kind: counts[kind] for kind in ("exact", "normalised", "canonical")}
            elif isinstance(source, PairSource):
                counted = self.pairs[name].overlap()
                found |= {f"{name}/{group}" if group else name: counts for group, counts in counted.items()}
            elif not isinstance(source, Texts):
                found[name] = source.overlap()
        return found

    def fingerprint(self) -> str:
        """A digest of what decides the data, but for the seed and where files lie.

        It changes with the mixture, the row length, the tokenizer, the texts and with what the tasks' code draws.
        """
        parts = []
        for name, source in zip(self.names, self.config.sources, strict=True):
            if isinstance(source, TaskSource):
                drawn = source.task.batch(0, "train", np.arange(64), source.task.train)
                content = hashlib.sha256(drawn.question.tobytes() + drawn.answer.tobytes()).hexdigest()
            elif isinstance(source, Texts):
                content = self.texts[name].about["text"]
            else:
                content = source.content()
            parts.append([name, source.model_dump(mode="json", exclude=WHERE), content])
        return digest({"tokenizer": self.tokenizer.fingerprint, "sequence": self.config.sequence, "sources": parts})

    def _shares(self, step: int) -> np.ndarray:
        shares = np.array([source.share(step) for source in self.config.sources])
        return shares / shares.sum()

    def _windows(self, shards: Shards, rows: int) -> Iterator[TextBatch]:
        length = self.config.sequence
        for first in range(0, shards.valid.windows(length), rows):
            index = np.arange(first, min(first + rows, shards.valid.windows(length)))
            tokens, targets, documents = shards.valid.rows(index, length)
            sizes = self.tokenizer.byte_counts(np.where(targets == IGNORE, PAD, targets))
            yield TextBatch(tokens, targets, documents, sizes, index)


@dataclass(frozen=True)
class _TaskRows:
    """Rows of packed examples."""

    source: TaskSource
    seed: int
    tokenizer: Tokenizer
    length: int
    typical: float

    def rows(self, step: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sizes = self.source.sizes(step)
        return pack(self.source.task, self.seed, numbers, sizes, self.tokenizer, self.length, self.typical)


@dataclass(frozen=True)
class _TextRows:
    """Windows of training text: row number n is place n of an endless series of shuffled passes.

    Rows are numbered over the whole run, so beside other sources a text shows, pass by pass, a random part of its
    windows as large as its share of the rows, none of them twice.
    """

    shards: Shards
    secret: Key
    length: int

    def rows(self, step: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        windows = shuffled(self.secret, self.shards.train.windows(self.length), numbers)
        return self.shards.train.rows(windows, self.length)


@dataclass(frozen=True)
class _PairRows:
    """Rows of packed pairs, as an endless series of shuffled passes."""

    packed: Packed
    secret: Key

    def rows(self, step: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.packed.rows(shuffled(self.secret, self.packed.windows, numbers))
