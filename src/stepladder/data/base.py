"""What a task is: examples as pure functions of (seed, split, index, size), train and test disjoint by construction."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import numpy as np
from pydantic import model_validator

from stepladder.core.config import Field, Kinded, register
from stepladder.core.errors import UserError
from stepladder.core.keys import Key, below, hash64, key
from stepladder.core.registry import Registry
from stepladder.data.dice import GOLDEN, Dice, mix

SPLITS = {"test": (0, 1), "valid": (1, 2), "train": (2, 8)}
"""Which of the eight buckets of the canonical question's hash belong to a split: from, to (exclusive)."""

_STRIDE = 0xD1B54A32D192ED03  # what GOLDEN is in a row, between the attempts at one item; any other odd constant does
_WORDS = 4  # random words of a candidate; Dice stretches them
_CHUNK = 4096  # neighbours that are sorted by size
_SLICE = 2048  # rows drawn together: enough to hide NumPy's overhead, few enough to stay in the cache

T = TypeVar("T", bound="type[Task]")
Range = Annotated[tuple[int, int], Field(description="smallest and largest size in training, both inclusive")]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Examples:
    """Questions and answers as ASCII codes, one example a row, right-padded with 0.

    ``question`` uint8 [n, Q], ``answer`` uint8 [n, A], ``size`` int64 [n] (place on the task's difficulty axis).
    """

    question: np.ndarray
    answer: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.size)

    def questions(self) -> list[str]:
        """The questions as Python text."""
        return strings(self.question)

    def answers(self) -> list[str]:
        """The answers as Python text."""
        return strings(self.answer)

    def take(self, rows: np.ndarray) -> Examples:
        """The examples at ``rows`` (positions, or a mask)."""
        return Examples(self.question[rows], self.answer[rows], self.size[rows])

    @staticmethod
    def join(parts: Sequence[Examples]) -> Examples:
        """All examples of ``parts`` one after the other, no wider than their longest texts."""
        sizes = [part.size for part in parts]
        return Examples(
            _stacked([part.question for part in parts]),
            _stacked([part.answer for part in parts]),
            np.concatenate(sizes) if sizes else np.empty(0, np.int64),
        )


def strings(matrix: np.ndarray) -> list[str]:
    """The rows of a zero-padded uint8 matrix of ASCII codes (or other UTF-8) as Python text."""
    if matrix.shape[1] == 0:
        return [""] * len(matrix)
    rows = np.ascontiguousarray(matrix).view(f"S{matrix.shape[1]}")[:, 0]
    return [row.decode() for row in rows.tolist()]


def codes(texts: Sequence[str]) -> np.ndarray:
    """Texts as a zero-padded uint8 matrix [n, L]: undoes ``strings``."""
    rows = np.array([text.encode() for text in texts] or [b""])
    return rows.view(np.uint8).reshape(len(rows), -1)[: len(texts)]


def _stacked(matrices: Sequence[np.ndarray]) -> np.ndarray:
    width = max((m.shape[1] for m in matrices), default=0)
    stacked = np.zeros((sum(map(len, matrices)), width), np.uint8)
    start = 0
    for matrix in matrices:
        stacked[start : start + len(matrix), : matrix.shape[1]] = matrix
        start += len(matrix)
    used = np.flatnonzero(stacked.any(axis=0))
    return stacked[:, : used[-1] + 1 if used.size else 0]


def _hash(matrix: np.ndarray, salt: int) -> np.ndarray:
    """A 64-bit hash for every row of a uint8 matrix; zeros at the right end of the rows make no difference."""
    padded = np.zeros((len(matrix), -(-matrix.shape[1] // 8) * 8), np.uint8)
    padded[:, : matrix.shape[1]] = matrix
    words = padded.view("<u8")
    # A word of zeros contributes nothing (_mix keeps 0), so a row hashes alike however wide its batch is.
    odd = mix(np.arange(1, words.shape[1] + 1, dtype=np.uint64) * np.uint64(GOLDEN)) | np.uint64(1)
    return mix(mix(words * odd).sum(axis=1, dtype=np.uint64) ^ np.uint64(salt))


class Asked(Protocol):
    """What the suites of tasks ask and score: a Task, or a group of held-out pairs."""

    @property
    def iid(self) -> Sizes:
        """Sizes inside the training range."""

    @property
    def ood(self) -> Sizes:
        """Sizes beyond it."""

    def items(self, seed: int, samples: int) -> tuple[Examples, np.ndarray]:
        """Test examples, at most ``samples`` of every size; and the place [n] of each among those of its size."""

    def glance(self, seed: int, samples: int) -> Examples:
        """At most ``samples`` examples to look at during training, of the sizes trained on."""

    def verify(self, question: str, output: str) -> bool:
        """Whether ``output``, the text up to the end-of-sequence token, is right."""

    def marks(self, question: str, output: str) -> dict[str, float]:
        """Further scores of an output, 0..1 by name: they stand beside exact match, never instead of it."""

    def solve(self, question: str) -> str:
        """The right answer."""

    def chance(self, size: int) -> float:
        """The accuracy of a uniform guess at ``size``."""


class Task(Kinded):
    """A family of questions with one right answer each and a difficulty axis, ``size``.

    A subclass in a file of its own sets ``axis`` and ``alphabet`` and a default ``train``, and writes ``draw``,
    ``solve``, ``chance`` and ``max_answer``; ``@task("name")`` above it registers it. A question is short printable
    ASCII that ends in "=" and says by itself which task it is of; the answer has no padding.

    Inside the training range is IID, beyond its upper end OOD. Unless given, ``iid`` are the quarter points of the
    range and ``ood`` its end times ``growth``.
    """

    complexity: ClassVar[str | None] = None  # of the algorithm that the task is, where one is meant: "O(n) time, ..."
    axis: ClassVar[str]  # what size counts: "digits"
    alphabet: ClassVar[str]  # every character that a question or an answer may have
    smallest: ClassVar[int] = 1
    largest: ClassVar[int] = 1024
    growth: ClassVar[tuple[float, ...]] = (1.25, 1.5, 2, 4, 8)

    train: Range
    iid: Sizes = Field((), description="sizes evaluated inside the training range [its quarter points]")
    ood: Sizes = Field((), description="sizes evaluated beyond the training range [its end x1.25 to x8]")

    @abstractmethod
    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        """One candidate for every entry of ``size`` int64 [n]; an empty answer means: no good, draw again."""

    @abstractmethod
    def solve(self, question: str) -> str:
        """The answer, worked out in plain Python from the text alone: shares no code with ``draw``."""

    @abstractmethod
    def chance(self, size: int) -> float:
        """The accuracy of guessing uniformly among the answers that are possible at ``size``."""

    @abstractmethod
    def max_answer(self, size: int) -> int:
        """The length in characters of the longest answer at ``size``."""

    def canonical(self, examples: Examples) -> np.ndarray:
        """One text for all questions that are the same question (``1+2=``, ``2+1=``): uint8 [n, C], 0-padded."""
        return examples.question

    def verify(self, question: str, output: str) -> bool:
        """Whether ``output``, the text up to the end-of-sequence token, is right.

        The rule is equality, character for character: "012", " 12", "12." and "12 = 12" are all wrong for "12".
        """
        return output == self.solve(question)

    def marks(self, question: str, output: str) -> dict[str, float]:
        """Further scores of an output, 0..1 by name; here none."""
        return {}

    def batch(
        self,
        seed: int,
        split: str,
        indices: np.ndarray,
        size: int | tuple[int, int] | np.ndarray,
    ) -> Examples:
        """The examples at ``indices`` [n] (any order, repeats allowed) of a split ("train", "valid" or "test").

        ``size`` is one size, a range ``(low, high)`` from which every index draws its own uniformly, or an array [n].
        Example i depends on (seed, split, index i, size) only. Raises UserError for a size that the task does not
        have, or one at which the split has no items.
        """
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        root = key(seed, "data", self.kind, split)
        sizes = self._sizes(root / "size", indices, size)
        order = np.argsort(indices, kind="stable")  # neighbours share a sweep of the random stream
        parts: list[Examples] = []
        places: list[np.ndarray] = []
        for start in range(0, len(order), _CHUNK):
            near = order[start : start + _CHUNK]
            near = near[np.argsort(sizes[near], kind="stable")]  # a slice is drawn as wide as its longest text
            for first in range(0, len(near), _SLICE):
                rows = near[first : first + _SLICE]
                for found, part in self._fill(root, split, indices[rows], sizes[rows]):
                    places.append(rows[found])
                    parts.append(part)
        back = np.empty(len(indices), np.int64)
        back[np.concatenate([*places, np.empty(0, np.int64)])] = np.arange(len(indices))
        return Examples.join(parts).take(back)

    def items(self, seed: int, samples: int) -> tuple[Examples, np.ndarray]:
        """The first ``samples`` test examples of every evaluated size, and the index [n] of each."""
        sizes = self.iid + self.ood
        index = np.tile(np.arange(samples), len(sizes))
        return self.batch(seed, "test", index, np.repeat(sizes, samples)), index

    def glance(self, seed: int, samples: int) -> Examples:
        """The first ``samples`` validation examples of the training range."""
        return self.batch(seed, "valid", np.arange(samples), self.train)

    def fingerprints(self, examples: Examples) -> np.ndarray:
        """A 64-bit hash of every canonical question: uint64 [n]."""
        return _hash(self.canonical(examples), self._salt)

    def admits(self, split: str, examples: Examples) -> np.ndarray:
        """Which examples belong to ``split``, by the hash of their canonical question: bool [n]."""
        low, high = SPLITS[split]
        bucket = (self.fingerprints(examples) & np.uint64(7)).astype(np.int64)
        return (low <= bucket) & (bucket < high) & examples.answer.any(axis=1)

    def _fill(
        self, root: Key, split: str, indices: np.ndarray, sizes: np.ndarray
    ) -> Iterator[tuple[np.ndarray, Examples]]:
        """(positions, examples) until every position has the first of its candidates that the split admits."""
        words = root.words(indices, _WORDS)
        missing = np.arange(len(indices))
        attempt, suspicious = 0, 64
        while missing.size:
            if attempt >= suspicious:  # this can go on, if rarely; but not where there is nothing to be found
                self._require(split, np.unique(sizes[missing]).tolist())
                suspicious = 2**63
            # Few rows are left: look several attempts ahead at once. The first admitted one counts, so that the
            # example does not depend on how far we looked.
            ahead = max(1, min(16, 256 // missing.size))
            steps = np.arange(attempt + 1, attempt + ahead + 1, dtype=np.uint64) * np.uint64(_STRIDE)
            candidates = self.draw(
                Dice(mix(words[missing] + steps[:, None, None]).reshape(-1, _WORDS)),
                np.tile(sizes[missing], ahead),
            )
            admitted = self.admits(split, candidates).reshape(ahead, -1)
            found = admitted.any(axis=0)
            chosen = admitted.argmax(axis=0) * len(missing) + np.arange(len(missing))
            yield missing[found], candidates.take(chosen[found])
            missing = missing[~found]
            attempt += ahead

    def _sizes(self, root: Key, indices: np.ndarray, size: int | tuple[int, int] | np.ndarray) -> np.ndarray:
        if isinstance(size, tuple):
            low, high = size
            if low > high:
                raise UserError(f"{self.kind}: the range of sizes {low}..{high} is empty; give the smaller end first")
            sizes = low + below(root.words(indices, 1)[:, 0], high - low + 1)
        else:
            sizes = np.broadcast_to(np.asarray(size, dtype=np.int64), indices.shape)
            low, high = int(sizes.min(initial=self.largest)), int(sizes.max(initial=self.smallest))
        if low < self.smallest or high > self.largest:
            wrong = low if low < self.smallest else high
            raise UserError(f"{self.kind} has no size {wrong}; {self.axis} go from {self.smallest} to {self.largest}")
        return sizes

    def _require(self, split: str, sizes: Iterable[int]) -> None:
        """UserError for the first of these sizes at which the split has no items, as far as 65,536 candidates tell."""

        def some(size: int) -> bool:
            source = key(0, "data", self.kind, "search")
            blocks = (source.words(np.arange(1024) + start, _WORDS) for start in range(0, 2**16, 1024))
            return any(self.admits(split, self.draw(Dice(words), np.full(1024, size))).any() for words in blocks)

        for size in sizes:
            if not some(size):
                larger = next((s for s in range(size + 1, min(size + 64, self.largest) + 1) if some(s)), None)
                way_out = "another size" if larger is None else f"a size of at least {larger}"
                raise UserError(f"{self.kind} at size {size} has no {split} items; use {way_out}")

    @cached_property
    def _salt(self) -> int:
        return hash64(self.kind)

    @model_validator(mode="before")
    @classmethod
    def _grids(cls, tree: Any) -> Any:
        """``iid`` and ``ood`` from ``train`` where they are not given."""
        if not isinstance(tree, Mapping):
            return tree
        try:
            low, high = map(int, tree.get("train", cls.model_fields["train"].default))
        except (TypeError, ValueError, OverflowError):
            return tree  # the field's own check says what is wrong
        iid = sorted({int(low + (high - low) * quarter / 4 + 0.5) for quarter in range(1, 5)})
        ood = sorted({math.ceil(high * times) for times in cls.growth})
        return {"iid": iid, "ood": [size for size in ood if high < size <= cls.largest], **tree}

    @model_validator(mode="after")
    def _ranges(self) -> Task:
        low, high = self.train
        if not self.smallest <= low <= high <= self.largest:
            raise ValueError(
                f"train = {low}..{high}: {self.axis} go from {self.smallest} to {self.largest}, smaller end first"
            )
        for name, sizes in (("iid", self.iid), ("ood", self.ood)):
            if len(set(sizes)) < len(sizes):
                raise ValueError(f"{name} names a size twice; give each one once")
        for size in self.iid:
            if not low <= size <= high:
                raise ValueError(f"iid = {size} is outside the training range {low}..{high}; move it to ood")
        for size in self.ood:
            if not high < size <= self.largest:
                raise ValueError(f"ood = {size} must be beyond the training range, {high + 1}..{self.largest}")
        return self


TASKS: Registry[type[Task]] = Registry("task")
"""All registered tasks; importing ``stepladder.data.tasks`` fills it."""


def task(name: str) -> Callable[[T], T]:
    """``@task("parity")`` above a Task class registers it under that name."""
    return register(TASKS, name)


def tightened(question: str) -> str:
    """A question without its accidents: no spaces, lower case, operands of + * ? in one order (plain text only)."""
    tight = re.sub(r"\s", "", question).casefold()
    return re.sub(r"(\d+)([+*?])(\d+)", lambda m: m[2].join(sorted((m[1], m[3]))), tight)


def overlap(
    task: Task,
    seed: int,
    n: int,
    size: int | tuple[int, int] | None = None,
    splits: tuple[str, str] = ("train", "test"),
) -> dict[str, int]:
    """How many questions two splits share, measured on the first ``n`` items of each (default: the training range).

    Returns the number of different questions drawn from each split, under its name, and the number of those of the
    second that are in the first: ``exact`` as they stand, ``normalised`` after ``tightened``, ``canonical`` in the
    task's own canonical form. All three must be 0.
    """
    first, second = (task.batch(seed, split, np.arange(n), task.train if size is None else size) for split in splits)
    one, two = set(first.questions()), set(second.questions())
    return {
        splits[0]: len(one),
        splits[1]: len(two),
        "exact": len(one & two),
        "normalised": len(set(map(tightened, one)) & set(map(tightened, two))),
        "canonical": len(set(strings(task.canonical(first))) & set(strings(task.canonical(second)))),
    }
