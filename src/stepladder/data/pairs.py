"""Questions and answers from files: trained on in packed rows, asked and scored as tasks are.

A file is .jsonl or .jsonl.gz with one pair a line. What of the line is the question, the answer, the group (an
algorithm, say) and the size, templates tell: ``"{question}"``, ``"task={task}\\n{x}\\n"``, ``"{meta[n]}"``. Text is
cleaned as that of corpora is; white space around an answer is trimmed, since the end-of-sequence token ends it.

Held out is what the ``valid`` files hold, or without any, the pairs whose question hashes into one bucket of sixteen.
A held-out question is asked once, however often it occurs.
"""

from __future__ import annotations

import dataclasses
import os
import string
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from stepladder.core.config import digest
from stepladder.core.errors import UserError
from stepladder.core.keys import hash64, key, permute
from stepladder.data.base import Examples, Sizes, codes
from stepladder.data.corpora import clean, content, normalise, read_at, read_placed

_HELD = 16  # one question in so many is held out


class Pair(NamedTuple):
    """A question with its answer. ``place``: the file and the line."""

    question: str
    answer: str
    group: str
    size: int
    place: str


class Templates(NamedTuple):
    """What of a line is what; no ``group`` or ``size``: all are of one. ``final``: no template, but the text in the
    answer behind which, the last time it occurs, the result stands."""

    question: str
    answer: str
    group: str | None = None
    size: str | None = None
    final: str | None = None


class _Fields(string.Formatter):
    """Fills in texts and numbers, and nothing else."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{value!r} is neither a text nor a number")
        return str(super().format_field(value, format_spec))


_FIELDS = _Fields()
_UNCOUNTED: Counter[str] = Counter()  # of the cleaning, which nobody asks for


@lru_cache
def _pieces(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    return list(_FIELDS.parse(template))


def fields(template: str) -> list[str]:
    """The names of the fields that a template fills in; a flawed one is a ValueError."""
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    if not names or not all(name[:1].isalpha() or name[:1] == "_" for name in names):
        raise ValueError("must name a field of the lines in braces, such as '{question}'")
    return names


class Shelf:
    """Pairs that stay in their files until they are asked for: where each begins, in 14 bytes."""

    def __init__(self, files: Sequence[str], templates: Templates, columns: _Columns) -> None:
        self._files, self._templates = tuple(files), templates
        self._file, self._line, self._byte = columns.file, columns.line, columns.byte
        self._stamps = [_stamp(file) for file in files]

    def __len__(self) -> int:
        return len(self._file)

    def __iter__(self) -> Iterator[Pair]:
        """All pairs, in order, read anew."""
        return self._read(np.arange(len(self)))

    def take(self, rows: np.ndarray) -> list[Pair]:
        """The pairs at ``rows``, different positions in any order."""
        order = np.argsort(rows)
        found = dict(zip(order.tolist(), self._read(rows[order]), strict=True))
        return [found[place] for place in range(len(rows))]

    def _read(self, rows: np.ndarray) -> Iterator[Pair]:
        for number, file in enumerate(self._files):
            mine = rows[self._file[rows] == number]
            if len(mine):
                if _stamp(file) != self._stamps[number]:
                    raise UserError(f"pairs '{file}' was changed while it was in use; start again")
                places = ((int(self._line[row]), int(self._byte[row])) for row in mine)
                for line, entry in read_at(file, places):
                    yield _pair(file, line, entry, self._templates)


def _stamp(file: str) -> tuple[int, int]:
    about = os.stat(file)
    return about.st_size, about.st_mtime_ns


@dataclass(frozen=True)
class _Columns:
    """What a walk over files keeps of every pair: where it is, 64-bit hashes of its question, of that but for case and
    white space and of its answer, the place of its group and size in a list, and how many characters it has."""

    file: np.ndarray
    line: np.ndarray
    byte: np.ndarray
    exact: np.ndarray
    normalised: np.ndarray
    answer: np.ndarray
    cell: np.ndarray
    characters: np.ndarray

    def take(self, rows: np.ndarray) -> _Columns:
        return _Columns(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


Cells = dict[tuple[str, int], int]


def _walk(files: Sequence[str], templates: Templates, cells: Cells) -> _Columns:
    """All pairs of some files, in order; ``cells`` gets the groups and sizes that it lacks."""
    found = [array(kind) for kind in ("H", "I", "q", "Q", "Q", "Q", "i", "I")]
    for number, file in enumerate(files):
        for line, byte, entry in read_placed(file):
            question, answer, group, size, _ = _pair(file, line, entry, templates)
            exact, plain = hash64(question), normalise(question)
            cell = cells.setdefault((group, size), len(cells))
            row = (number, line, byte, exact, exact if plain == question else hash64(plain), hash64(answer), cell)
            for column, value in zip(found, (*row, len(question) + len(answer)), strict=True):
                column.append(value)
    return _Columns(*map(np.asarray, found))


class Pairs:
    """The pairs of a source: ``train`` and ``held``. Whatever is wrong with a file is a UserError.

    The files are walked through once; of every pair about 120 bytes are kept while that lasts and 14 from then on,
    never its text, so that files need not fit into memory.
    """

    def __init__(self, path: str, valid: Sequence[str], templates: Templates) -> None:
        cells: Cells = {}
        train = _walk((path,), templates, cells)
        if valid:
            held = _walk(valid, templates, cells)
        else:
            sides = train.normalised % np.uint64(_HELD) == 0
            train, held = train.take(~sides), train.take(sides)
        if not len(train.file) or not len(held.file):
            what = "too few pairs to hold some out" if len(train.file) or len(held.file) else "no pair"
            raise UserError(f"pairs '{path}' have {what}; give another file, or one of its own as 'valid'")
        held = held.take(_once(held, valid or (path,)))
        self.train, self.held = Shelf((path,), templates, train), Shelf(valid or (path,), templates, held)
        files = [content(file) for file in (path, *valid)]
        self.digest = digest({"files": files, "templates": list(templates)})
        self._characters = {"train": int(train.characters.sum()), "valid": int(held.characters.sum())}
        names = list(cells)
        groups, sizes = np.array([group for group, _ in names]), np.array([size for _, size in names])
        longest = dict.fromkeys(groups.tolist(), -1)
        for cell in np.unique(train.cell).tolist():
            longest[names[cell][0]] = max(longest[names[cell][0]], names[cell][1])
        chances = _chances(train, held, groups)
        exact, normalised = np.isin(held.exact, train.exact), np.isin(held.normalised, train.normalised)
        self.quizzes: dict[str, Quiz] = {}
        self._overlap: dict[str, dict[str, int]] = {}
        for group in sorted({names[cell][0] for cell in np.unique(held.cell).tolist()}):
            rows = np.flatnonzero((groups == group)[held.cell])
            chance = {names[cell][1]: chances[cell] for cell in np.unique(held.cell[rows]).tolist()}
            quiz = Quiz(group, self.held, rows, sizes[held.cell[rows]], longest[group], chance, templates.final)
            self.quizzes[group] = quiz
            shared = {"exact": int(exact[rows].sum()), "normalised": int(normalised[rows].sum())}
            self._overlap[group] = {"questions": len(rows), **shared}

    def documents(self, split: str) -> Iterator[str]:
        """Question and answer of every pair of "train" or "valid" (what is held out)."""
        return (pair.question + pair.answer for pair in (self.train if split == "train" else self.held))

    def characters(self, split: str) -> int:
        """How many characters ``documents`` gives."""
        return self._characters[split]

    def count(self, split: str) -> int:
        """How many pairs that are."""
        return len(self.train if split == "train" else self.held)

    def alphabet(self) -> set[str]:
        """Every character that occurs."""
        found: set[str] = set()
        for split in ("train", "valid"):
            for text in self.documents(split):
                found.update(text)
        return found

    def overlap(self) -> dict[str, dict[str, int]]:
        """By group: how many held-out ``questions`` there are, and how many of them are in the training pairs, as they
        stand (``exact``) and but for case and white space (``normalised``)."""
        return self._overlap


def _once(held: _Columns, files: Sequence[str]) -> np.ndarray:
    """The rows whose question did not occur before; one that comes again with another answer is a UserError."""
    _, first, same = np.unique(held.exact, return_index=True, return_inverse=True)
    if (other := np.flatnonzero(held.answer != held.answer[first][same])).size:
        again, before = (
            f"'{files[held.file[row]]}', line {held.line[row]}" for row in (other[0], first[same[other[0]]])
        )
        raise UserError(f"pairs {again}: the question of {before} has another answer here")
    return np.sort(first)


def _chances(train: _Columns, held: _Columns, groups: np.ndarray) -> dict[int, float]:
    """What ``Quiz.chance`` says, by held-out cell."""
    by_cell = np.argsort(train.cell, kind="stable")
    edges = np.searchsorted(train.cell[by_cell], np.arange(len(groups) + 1))

    def trained(cell: int) -> np.ndarray:
        return np.unique(train.answer[by_cell[edges[cell] : edges[cell + 1]]])

    found = {}
    for cell in np.unique(held.cell).tolist():
        cells = [cell] if edges[cell] < edges[cell + 1] else np.flatnonzero(groups == groups[cell]).tolist()
        asked, times = np.unique(held.answer[np.isin(held.cell, cells)], return_counts=True)
        learnt = np.unique(np.concatenate([trained(one) for one in cells]))
        mine = held.answer[held.cell == cell]
        elsewhere = np.isin(mine, learnt) | (times[np.searchsorted(asked, mine)] > 1)
        found[cell] = float(elsewhere.mean()) / len(np.union1d(asked, learnt))
    return found


class Quiz:
    """The held-out pairs of a group: what the suites of tasks ask and score (see ``Asked``).

    ``rows`` [n]: its places on the shelf, of these ``sizes`` [n]; ``chance`` by size. Sizes up to the ``longest`` that
    the group was trained on are iid, those beyond are ood, and so are all of a group that was not trained on.
    """

    def __init__(
        self,
        group: str,
        shelf: Shelf,
        rows: np.ndarray,
        sizes: np.ndarray,
        longest: int,
        chance: Mapping[int, float],
        final: str | None = None,
    ) -> None:
        self.group, self._shelf, self._rows, self._sizes = group, shelf, rows, sizes
        self._chance, self._final = chance, final
        self._read: dict[int, Pair] = {}  # what was asked for, by row
        self._answer: dict[str, str] = {}
        different = np.unique(sizes).tolist()
        self.iid: Sizes = tuple(size for size in different if size <= longest)
        self.ood: Sizes = tuple(size for size in different if size > longest)

    def items(self, seed: int, samples: int) -> tuple[Examples, np.ndarray]:
        """At most ``samples`` pairs of every size, chosen by the seed; and the place of each among its size's."""
        parts = []
        for size in self.iid + self.ood:
            mine = self._rows[self._sizes == size]
            parts.append(mine[permute(key(seed, "data", "pairs", self.group, size), len(mine), np.arange(len(mine)))])
            parts[-1] = parts[-1][:samples]
        index = np.concatenate([np.arange(len(part)) for part in parts])
        return _examples(self._fetch(np.concatenate(parts))), index

    def glance(self, seed: int, samples: int) -> Examples:
        """At most ``samples`` pairs of the sizes trained on (of all, if it was not trained on), chosen by the seed."""
        known = self._rows[np.isin(self._sizes, self.iid)] if self.iid else self._rows
        order = permute(key(seed, "data", "pairs", self.group), len(known), np.arange(len(known)))
        return _examples(self._fetch(known[order[:samples]]))

    def verify(self, question: str, output: str) -> bool:
        """Whether ``output`` is the answer, character for character."""
        return output == self.solve(question)

    def marks(self, question: str, output: str) -> dict[str, float]:
        """``final``: whether the result is right, whatever the steps before it, where such a mark is set."""
        if self._final is None:
            return {}
        wanted, given = (text.rpartition(self._final)[2] for text in (self.solve(question), output))
        return {"final": float(wanted == given)}

    def solve(self, question: str) -> str:
        """The answer."""
        if question not in self._answer:
            self._fetch(self._rows)
        return self._answer[question]

    def chance(self, size: int) -> float:
        """The accuracy at ``size`` of guessing uniformly among the answers that are known without the question's own.

        Known are the answers of the group at that size, trained on or asked in another held-out question; at a size
        that the group was not trained on, those of the group at any size. So an answer that nothing else has cannot be
        guessed: a group with a few questions of its own, all answered differently, is at 0, and one of yes and no at
        a half, whether it was trained on or not.
        """
        return self._chance[size]

    def _fetch(self, rows: np.ndarray) -> list[Pair]:
        """The pairs at some rows; those asked for before are not read again."""
        new = np.array([row for row in rows.tolist() if row not in self._read], np.int64)
        if len(new):
            pairs = self._shelf.take(new)
            self._read.update(zip(new.tolist(), pairs, strict=True))
            self._answer.update((pair.question, pair.answer) for pair in pairs)
        return [self._read[row] for row in rows.tolist()]


def _examples(pairs: Sequence[Pair]) -> Examples:
    texts = (codes([pair.question for pair in pairs]), codes([pair.answer for pair in pairs]))
    return Examples(*texts, size=np.array([pair.size for pair in pairs], np.int64))


def _pair(path: str, number: int, row: Mapping[str, Any], templates: Templates) -> Pair:
    """What a line of a file holds."""
    place = f"'{path}', line {number}"
    question, answer = (_text(template, row, place) for template in templates[:2])
    answer = answer.strip()
    if not question or not answer:
        raise UserError(f"pairs {place}: the {'answer' if question else 'question'} is empty")
    group, size = (template and _text(template, row, place) for template in templates[2:4])
    if size is not None and not size.isdecimal():
        raise UserError(f"pairs {place}: the size '{size}' is no whole number")
    return Pair(question, answer, group or "", int(size or 0), place)


def _text(template: str, row: Mapping[str, Any], place: str) -> str:
    """A template filled in, as ``string.Formatter`` does, but in a third of the time where there is nothing special."""
    filled = []
    try:
        for literal, name, spec, conversion in _pieces(template):
            filled.append(literal)
            if spec or conversion:
                return clean(_FIELDS.vformat(template, (), row), _UNCOUNTED)
            if name is not None:
                value = row[name] if name.isidentifier() else _FIELDS.get_field(name, (), row)[0]
                filled.append(value if isinstance(value, str) else _FIELDS.format_field(value, ""))
        return clean("".join(filled), _UNCOUNTED)
    except KeyError as error:
        has = ", ".join(row) or "no fields"
        raise UserError(f"pairs {place}: '{template}' asks for {error}, the line has {has}") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"pairs {place}: '{template}' cannot be filled in ({error})") from error
