"""Where rows come from: the kinds of sources, and what the rows of one are to the stream."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from pydantic import BeforeValidator, field_validator

from stepladder.core.config import Field, Kinded, chosen, register
from stepladder.core.keys import Key, permute
from stepladder.core.registry import Registry
from stepladder.data.base import Asked, Task
from stepladder.data.corpora import Corpus, source_name
from stepladder.data.pairs import Pairs, Templates, fields
from stepladder.data.tasks import TASKS
from stepladder.data.tokenizers import Tokenizer

Amount = Annotated[float, Field(ge=0)]
Step = Annotated[int, Field(ge=0)]


class Source(Kinded):
    """Where rows come from, and how often: the kinds are ``task``, ``pairs``, ``text``, ``corpus`` and ``images``."""

    serves: ClassVar[str] = ""  # the suites that ask about it: those that need a "task", a "text" or an "image"

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
SOURCES.lazy("corpus", "stepladder.data.published:CorpusSource", extra="hf")


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


class Texts(Source):
    """Windows of the tokens of documents, in an order shuffled anew for every pass."""

    serves: ClassVar[str] = "text"

    @abstractmethod
    def corpus(self, cache: Path) -> Corpus:
        """The documents; what has to be fetched is kept in the folder ``cache``."""


@register(SOURCES, "text")
class TextSource(Texts):
    """The documents of a file."""

    path: str = Field(description="'pydoc' (built in), or a file .txt or .jsonl, also .gz")
    valid: str | None = Field(None, description="validation file [1/16 of the documents, by hash]")

    @property
    def label(self) -> str:
        """The file's name without folders and endings."""
        return source_name(self.path)

    def corpus(self, cache: Path) -> Corpus:
        """The file's documents, read where it lies."""
        return Corpus(self.path, self.valid)


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
        """What the files hold, walked through once."""
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


AnySource = Annotated[Source, BeforeValidator(chosen(SOURCES, "source"))]
"""A node of a configuration that names a kind of source."""


@dataclass(frozen=True)
class Shown:
    """The images of rows: ``pixels`` uint8 ``[B, I, C, Y, X]``, and ``slots`` int64 ``[B, T]``.

    A slot is the number, in its row, of the image's embedding that stands there (see models.base.Images), or -1.
    """

    pixels: np.ndarray
    slots: np.ndarray


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


def shuffled(secret: Key, size: int, numbers: np.ndarray) -> np.ndarray:
    """Places [B] in an endless series of shuffled passes over ``range(size)``: what stands there."""
    passes, places = np.divmod(numbers, size)
    found = np.empty_like(places)
    for number in np.unique(passes):
        mine = passes == number
        found[mine] = permute(secret / int(number), size, places[mine])
    return found
