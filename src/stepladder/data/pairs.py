"""Questions and answers from files: trained on in packed rows, asked and scored as tasks are.

A file is .jsonl or .jsonl.gz with one pair a line. What of the line is the question, the answer, the group (an
algorithm, say) and the size, templates tell: ``"{question}"``, ``"task={task}\\n{x}\\n"``, ``"{meta[n]}"``. Text is
cleaned as that of corpora is; white space around an answer is trimmed, since the end-of-sequence token ends it.

Held out is what the ``valid`` files hold, or without any, the pairs whose question hashes into one bucket of sixteen.
A held-out question is asked once, however often it occurs.
"""

from __future__ import annotations

import hashlib
import string
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from stepladder.core.config import digest
from stepladder.core.errors import UserError
from stepladder.core.keys import Key, key, permute
from stepladder.data.base import Examples, Sizes, codes
from stepladder.data.corpora import clean, content, normalise, read_rows
from stepladder.data.tokenizers import BOS, EOS, IGNORE, PAD, Tokenizer

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


def fields(template: str) -> list[str]:
    """The names of the fields that a template fills in; a flawed one is a ValueError."""
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    if not names or not all(name[:1].isalpha() or name[:1] == "_" for name in names):
        raise ValueError("must name a field of the lines in braces, such as '{question}'")
    return names


class Pairs:
    """The pairs of a source: ``train`` and ``held``, read once. Whatever is wrong with a file is a UserError."""

    def __init__(self, path: str, valid: Sequence[str], templates: Templates) -> None:
        self.train = list(_read(path, templates))
        if valid:
            held = [pair for file in valid for pair in _read(file, templates)]
        else:
            sides = [_hash(normalise(pair.question)) % _HELD == 0 for pair in self.train]
            held = [pair for pair, side in zip(self.train, sides, strict=True) if side]
            self.train = [pair for pair, side in zip(self.train, sides, strict=True) if not side]
        if not self.train or not held:
            what = "no pair" if not self.train and not held else "too few pairs to hold some out"
            raise UserError(f"pairs '{path}' have {what}; give another file, or one of its own as 'valid'")
        self.held = _once(held)
        files = [content(file) for file in (path, *valid)]
        self.digest = digest({"files": files, "templates": list(templates)})
        trained, held_by = _by_group(self.train), _by_group(self.held)
        self.quizzes = {
            group: Quiz(group, held_by[group], trained.get(group, []), templates.final) for group in sorted(held_by)
        }

    def documents(self, split: str) -> Iterator[str]:
        """Question and answer of every pair of "train" or "valid" (what is held out)."""
        return (pair.question + pair.answer for pair in (self.train if split == "train" else self.held))

    def characters(self, split: str) -> int:
        """How many characters ``documents`` gives."""
        return sum(map(len, self.documents(split)))

    def alphabet(self) -> set[str]:
        """Every character that occurs."""
        return set().union(*self.documents("train"), *self.documents("valid"))

    def overlap(self) -> dict[str, dict[str, int]]:
        """By group: how many held-out ``questions`` there are, and how many of them are in the training pairs, as they
        stand (``exact``) and but for case and white space (``normalised``)."""
        exact = {pair.question for pair in self.train}
        normalised = set(map(normalise, exact))
        return {
            group: {
                "questions": len(quiz.pairs),
                "exact": sum(pair.question in exact for pair in quiz.pairs),
                "normalised": sum(normalise(pair.question) in normalised for pair in quiz.pairs),
            }
            for group, quiz in self.quizzes.items()
        }


class Quiz:
    """The held-out pairs of a group: what the suites of tasks ask and score (see ``Asked``).

    Sizes up to the longest that the group was trained on are iid, those beyond are ood, and so are all of a group that
    was not trained on.
    """

    def __init__(self, group: str, pairs: list[Pair], trained: list[Pair], final: str | None = None) -> None:
        self.group, self.pairs, self._final = group, pairs, final
        self._answer = {pair.question: pair.answer for pair in pairs}
        self._known: defaultdict[int, set[str]] = defaultdict(set)  # answers by size
        for pair in (*pairs, *trained):
            self._known[pair.size].add(pair.answer)
        sizes = sorted({pair.size for pair in pairs})
        longest = max((pair.size for pair in trained), default=-1)
        self.iid: Sizes = tuple(size for size in sizes if size <= longest)
        self.ood: Sizes = tuple(size for size in sizes if size not in self.iid)

    def items(self, seed: int, samples: int) -> tuple[Examples, np.ndarray]:
        """At most ``samples`` pairs of every size, chosen by the seed; and the place of each among its size's."""
        parts = []
        for size in self.iid + self.ood:
            mine = [pair for pair in self.pairs if pair.size == size]
            order = permute(key(seed, "data", "pairs", self.group, size), len(mine), np.arange(len(mine)))
            parts.append(_examples([mine[place] for place in order[:samples].tolist()]))
        index = np.concatenate([np.arange(len(part)) for part in parts])
        return Examples.join(parts), index

    def glance(self, seed: int, samples: int) -> Examples:
        """At most ``samples`` pairs of the sizes trained on (of all, if it was not trained on), chosen by the seed."""
        known = [pair for pair in self.pairs if pair.size in self.iid] or self.pairs
        order = permute(key(seed, "data", "pairs", self.group), len(known), np.arange(len(known)))
        return _examples([known[place] for place in order[:samples].tolist()])

    def verify(self, question: str, output: str) -> bool:
        """Whether ``output`` is the answer, character for character."""
        return output == self._answer[question]

    def marks(self, question: str, output: str) -> dict[str, float]:
        """``final``: whether the result is right, whatever the steps before it, where such a mark is set."""
        if self._final is None:
            return {}
        wanted, given = (text.rpartition(self._final)[2] for text in (self._answer[question], output))
        return {"final": float(wanted == given)}

    def solve(self, question: str) -> str:
        """The answer."""
        return self._answer[question]

    def chance(self, size: int) -> float:
        """The accuracy of guessing uniformly among all answers that occur at ``size``, trained on or held out."""
        return 1 / len(self._known[size])


def _by_group(pairs: list[Pair]) -> dict[str, list[Pair]]:
    found: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        found[pair.group].append(pair)
    return dict(found)


def _examples(pairs: Sequence[Pair]) -> Examples:
    texts = (codes([pair.question for pair in pairs]), codes([pair.answer for pair in pairs]))
    return Examples(*texts, size=np.array([pair.size for pair in pairs], np.int64))


def _read(path: str, templates: Templates) -> Iterator[Pair]:
    """The pairs of a file, in order."""
    for number, row in read_rows(path):
        place = f"'{path}', line {number}"
        question, answer = (_text(template, row, place) for template in templates[:2])
        answer = answer.strip()
        if not question or not answer:
            raise UserError(f"pairs {place}: the {'answer' if question else 'question'} is empty")
        group, size = (template and _text(template, row, place) for template in templates[2:4])
        if size is not None and not size.isdecimal():
            raise UserError(f"pairs {place}: the size '{size}' is no whole number")
        yield Pair(question, answer, group or "", int(size or 0), place)


def _text(template: str, row: Mapping[str, Any], place: str) -> str:
    try:
        return clean(_Fields().vformat(template, (), row), Counter())
    except KeyError as error:
        has = ", ".join(row) or "no fields"
        raise UserError(f"pairs {place}: '{template}' asks for {error}, the line has {has}") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"pairs {place}: '{template}' cannot be filled in ({error})") from error


def _once(pairs: list[Pair]) -> list[Pair]:
    """The pairs whose question did not occur before; one that comes again with another answer is a UserError."""
    first: dict[str, Pair] = {}
    for pair in pairs:
        known = first.setdefault(pair.question, pair)
        if known.answer != pair.answer:
            raise UserError(f"pairs {pair.place}: the question of {known.place} has another answer here")
    return list(first.values())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


# Rows ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Pairs in rows of ``length`` tokens at most, one row after the other.

    ``tokens`` [N]: of every pair ``[BOS] question answer [EOS]``. ``scored`` [N]: answers and EOS. ``starts`` [R + 1]:
    where each row begins, and the end.
    """

    tokens: np.ndarray
    scored: np.ndarray
    starts: np.ndarray
    length: int

    @property
    def windows(self) -> int:
        """How many rows there are."""
        return len(self.starts) - 1

    def rows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows ``numbers`` [B]: int64 (tokens, targets, documents), each ``[B, length]``, as ``packing.pack``."""
        places = self.starts[numbers][:, None] + np.arange(self.length + 1)
        beyond = places >= self.starts[numbers + 1][:, None]
        places[beyond] = 0
        wide = np.where(beyond, PAD, self.tokens[places].astype(np.int64))
        targets = np.where(self.scored[places] & ~beyond, wide, IGNORE)[:, 1:]
        begins = (wide == BOS) | np.diff(beyond, axis=1, prepend=False)
        return wide[:, :-1], targets, np.cumsum(begins[:, :-1], axis=1) - 1


def packed(pairs: Sequence[Pair], tokenizer: Tokenizer, length: int, secret: Key) -> Packed:
    """All pairs, once each, in rows: in an order of ``secret``, a row ends where the next pair does not fit.

    A pair longer than a row is a UserError, never cut or skipped.
    """
    order = permute(secret, len(pairs), np.arange(len(pairs)))
    texts = [pairs[place] for place in order.tolist()]
    questions = tokenizer.encode_all([pair.question for pair in texts])
    answers = tokenizer.encode_all([pair.answer for pair in texts])
    sizes = np.array([len(q) + len(a) + 2 for q, a in zip(questions, answers, strict=True)])
    if (longest := int(sizes.max())) > length:
        raise UserError(
            f"pairs {texts[int(sizes.argmax())].place}: {longest} tokens do not fit into rows of {length};"
            f" set data.sequence to at least {longest}, or leave long pairs out"
        )
    kind = np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32
    ends = np.cumsum(sizes)
    tokens, scored = np.empty(int(ends[-1]), kind), np.zeros(int(ends[-1]), bool)
    for question, answer, end in zip(questions, answers, ends.tolist(), strict=True):
        first = end - 1 - len(answer)
        tokens[first - len(question) - 1] = BOS
        tokens[first - len(question) : first], tokens[first : end - 1] = question, answer
        tokens[end - 1], scored[first:end] = EOS, True
    starts = [0]
    while starts[-1] < len(tokens):
        starts.append(int(ends[np.searchsorted(ends, starts[-1] + length, side="right") - 1]))
    return Packed(tokens, scored, np.array(starts), length)
