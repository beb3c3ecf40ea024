"""The training stream: batch ``step`` is a pure function of (configuration, seed, step). There is no state at all.

So resuming at step k means asking for step k, a rank takes its rows by arithmetic, and every rung of a ladder sees the
same data. A row comes whole from one source, drawn by the weights of the mixture at its step.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from pydantic import BeforeValidator, field_validator, model_validator

from stepladder.core.config import Config, Field, Kinded, chosen, digest, register
from stepladder.core.errors import UserError
from stepladder.core.keys import Key, key, permute, unit
from stepladder.core.registry import Registry
from stepladder.data.base import Asked, Task, overlap
from stepladder.data.corpora import Corpus, source_name
from stepladder.data.packing import pack, probe
from stepladder.data.pairs import Packed, Pairs, Templates, fields, packed
from stepladder.data.shards import Learnable, Shards, learn, prepare
from stepladder.data.tasks import TASKS
from stepladder.data.tokenizers import IGNORE, PAD, TOKENIZERS, ByteConfig, Tokenizer, TokenizerConfig

Amount = Annotated[float, Field(ge=0)]
Step = Annotated[int, Field(ge=0)]

OVERLAP_ITEMS = 2000
"""Questions of each split that a task's overlap is measured on."""


class Source(Kinded):
    """Where rows come from, and how often: the kinds are ``task``, ``pairs`` and ``text``."""

    serves: ClassVar[str] = ""  # the suites that ask about it: those that need a "task", or a "text"

    weight: Amount | tuple[tuple[Step, Amount], ...] = Field(
        1.0,
        description="share of the rows, relative to the other sources; or [[step, share], ...], linear in between",
    )

    @property
    @abstractmethod
    def label(self) -> str:
        """What the source is called in records and reports."""

    def asked(self, name: str) -> list[tuple[str, Asked]]:
        """What suites of tasks ask of the source called ``name``, each with a name of its own."""
        return []

    def alphabet(self) -> set[str]:
        """Every character that a tokenizer of this source must know."""
        return set()

    def overlap(self) -> dict[str, int]:
        """How much of what is held out is in the training part, for kinds that the stream does not know."""
        raise NotImplementedError

    def content(self) -> str:
        """A digest of what is read, for kinds that are read whole."""
        raise NotImplementedError

    def open(self, name: str, seed: int, tokenizer: Tokenizer, length: int) -> Rows:
        """The rows of this source under the name it has in the run; for kinds that are not packed by the stream."""
        raise NotImplementedError

    @field_validator("weight")
    @classmethod
    def _in_order(cls, weight: float | tuple[tuple[int, float], ...]) -> float | tuple[tuple[int, float], ...]:
        if isinstance(weight, tuple):
            steps = [step for step, _ in weight]
            if not steps or any(after <= before for before, after in itertools.pairwise(steps)):
                raise ValueError("must be a number or a list of [step, share] with rising steps")
        return weight

    def share(self, step: int) -> float:
        """The weight at a step; before the first and after the last point it is constant."""
        if isinstance(self.weight, tuple):
            steps, shares = zip(*self.weight, strict=True)
            return float(np.interp(step, steps, shares))
        return self.weight


SOURCES: Registry[type[Source]] = Registry("data source")
SOURCES.lazy("images", "stepladder.data.images:ImageSource", extra="vision")


@register(SOURCES, "task")
class TaskSource(Source):
    """Examples of a synthetic task, packed."""

    serves: ClassVar[str] = "task"

    task: Annotated[Task, BeforeValidator(chosen(TASKS, "task"))]
    ramp: int = Field(
        0, ge=0, description="steps over which the upper end of the task's training range grows from its lower end"
    )

    @property
    def label(self) -> str:
        """The task."""
        return self.task.kind

    def asked(self, name: str) -> list[tuple[str, Asked]]:
        """The task."""
        return [(name, self.task)]

    def sizes(self, step: int) -> tuple[int, int]:
        """The range of sizes at a step, both ends inclusive."""
        low, high = self.task.train
        return low, high if step >= self.ramp else low + (high - low) * step // self.ramp


@register(SOURCES, "text")
class TextSource(Source):
    """Windows of a text's tokens, in an order shuffled anew for every pass."""

    serves: ClassVar[str] = "text"

    path: str = Field(description="'pydoc' (built in), or a file .txt or .jsonl, also .gz")
    valid: str | None = Field(None, description="validation file [1/16 of the documents, by hash]")

    @property
    def label(self) -> str:
        """The file's name without folders and endings."""
        return source_name(self.path)


@register(SOURCES, "pairs")
class PairSource(Source):
    """Questions and answers of a file, packed; every pair once in a pass, the rows in an order shuffled anew."""

    serves: ClassVar[str] = "task"

    path: str = Field(description="file .jsonl or .jsonl.gz, one pair a line")
    valid: tuple[str, ...] = Field((), description="held-out files [1/16 of the questions, by hash]")
    question: str = Field("{question}", description="template of the question, such as 'task={task}; {x}; '")
    answer: str = Field("{answer}", description="template of the answer")
    group: str | None = Field(None, description="template of what is scored apart, such as '{algo_name}'")
    size: str | None = Field(None, description="template of the size, a whole number, such as '{length}'")
    final: str | None = Field(
        None, min_length=1, description="text before an answer's result, such as ' | ': it is scored alone, too"
    )

    @property
    def label(self) -> str:
        """The file's name without folders and endings."""
        return source_name(self.path)

    def content(self) -> str:
        """A digest of the pairs."""
        return self.pairs.digest

    @cached_property
    def pairs(self) -> Pairs:
        """What the files hold, read once."""
        return Pairs(self.path, self.valid, Templates(self.question, self.answer, self.group, self.size, self.final))

    def asked(self, name: str) -> list[tuple[str, Asked]]:
        """The groups, as NAME/GROUP."""
        return [(f"{name}/{group}" if group else name, quiz) for group, quiz in self.pairs.quizzes.items()]

    @field_validator("valid", mode="before")
    @classmethod
    def _files(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else () if value is None else value

    @field_validator("question", "answer", "group", "size")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is not None:
            fields(value)
        return value


class DataConfig(Config):
    """What a run reads: a tokenizer, the length of a row, and a mixture of sources."""

    tokenizer: Annotated[TokenizerConfig, BeforeValidator(chosen(TOKENIZERS, "tokenizer"))] = ByteConfig()
    sequence: int = Field(128, ge=4, le=1 << 24, description="tokens in a row (T)")
    sources: tuple[Annotated[Source, BeforeValidator(chosen(SOURCES, "source"))], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _possible(self) -> DataConfig:
        points = {0} | {step for s in self.sources if isinstance(s.weight, tuple) for step, _ in s.weight}
        for step in sorted(points):  # the sum is linear between the points, so it is positive everywhere
            if sum(source.share(step) for source in self.sources) <= 0:
                raise ValueError(f"sources: all weights are 0 at step {step}; give one of them more")
        texts = [source.path for source in self.sources if isinstance(source, TextSource)]
        if texts and self.tokenizer.kind == "alphabet":
            raise ValueError(
                f"tokenizer 'alphabet' knows the tasks' characters only, not those of '{texts[0]}';"
                " use 'byte', 'char' or 'bpe'"
            )
        if self.tokenizer.kind == "bpe" and not any(isinstance(s, TextSource | PairSource) for s in self.sources):
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
class Shown:
    """The images of rows: ``pixels`` uint8 ``[B, I, C, Y, X]``, and ``slots`` int64 ``[B, T]``.

    A slot is the number, in its row, of the image's embedding that stands there (see models.base.Images), or -1.
    """

    pixels: np.ndarray
    slots: np.ndarray


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


class Rows(Protocol):
    """The training rows of one source."""

    def rows(self, step: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, targets, documents) of the rows with these numbers in the whole run."""


@runtime_checkable
class Illustrated(Rows, Protocol):
    """Rows that have images, or are made of some."""

    images: int  # at positions of a row
    source: Any  # with the geometry of an image, and what its held-out images are

    def shown(self, step: int, numbers: np.ndarray) -> Shown:
        """The images of the rows with these numbers."""

    def about(self) -> dict[str, Any]:
        """Counts of images and tokens, as data.json has them."""

    def expanded(self, params: int) -> Illustrated:
        """The rows for a model of so many parameters, where the number of different images depends on it."""


class Stream:
    """All the data of a run: training batches by step, validation text from front to back.

    ``cache`` is the folder where tokens are kept. ``tokenizer`` replaces the configured one by that of a finished run.
    Raises UserError if anything is missing, damaged or does not fit.
    """

    def __init__(self, config: DataConfig, seed: int, cache: Path, tokenizer: Tokenizer | None = None) -> None:
        self.config, self.seed, self.names = config, seed, config.names()
        texts = {i: Corpus(s.path, s.valid) for i, s in enumerate(config.sources) if isinstance(s, TextSource)}
        tasks = [source.task for source in config.sources if isinstance(source, TaskSource)]
        self.pairs = {self.names[i]: s.pairs for i, s in enumerate(config.sources) if isinstance(s, PairSource)}
        characters = set().union(*(task.alphabet for task in tasks), *(s.alphabet() for s in config.sources))
        if config.tokenizer.kind == "alphabet":
            characters = characters.union(*(pairs.alphabet() for pairs in self.pairs.values()))
        read: list[Learnable] = [*texts.values(), *self.pairs.values()]
        self.tokenizer = tokenizer or learn(config.tokenizer, "".join(sorted(characters)), read, cache)
        self.texts = {self.names[i]: prepare(corpus, self.tokenizer, cache) for i, corpus in texts.items()}
        self._rows: list[Rows] = []
        for name, source in zip(self.names, config.sources, strict=True):
            if isinstance(source, TaskSource):
                typical = probe(source.task, self.tokenizer, config.sequence)
                self._rows.append(_TaskRows(source, seed, self.tokenizer, config.sequence, typical))
            elif isinstance(source, PairSource):
                secret = key(seed, "data", "pairs", name)
                rows = packed(self.pairs[name].train, self.tokenizer, config.sequence, secret / "rows")
                self._rows.append(_PairRows(rows, secret))
            elif isinstance(source, TextSource):
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
            elif not isinstance(source, TextSource):
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
            elif isinstance(source, TextSource):
                content = self.texts[name].about["text"]
            else:
                content = source.content()
            parts.append([name, source.model_dump(mode="json", exclude={"path", "valid"}), content])
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


def shuffled(secret: Key, size: int, numbers: np.ndarray) -> np.ndarray:
    """Places [B] in an endless series of shuffled passes over ``range(size)``: what stands there."""
    passes, places = np.divmod(numbers, size)
    found = np.empty_like(places)
    for number in np.unique(passes):
        mine = passes == number
        found[mine] = permute(secret / int(number), size, places[mine])
    return found
