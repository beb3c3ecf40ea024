"""Items of the ``longctx`` suite: a fact hidden at a known depth of real text, which the end of the text asks for.

An item has exactly the tokens it is said to have, counted as a training example is: BOS, the haystack with its facts,
the question, the answer, EOS. The haystack is validation text: documents in a keyed order, joined by spaces; the first
begins at any of its sentences, the last is cut. A fact has the form of the task ``needle``
(``the code of amber=48213.``) and stands where a sentence ends, or at least a word. The one asked for starts within
1/16 of the haystack from the depth it is said to have, 0 being the first place of the text and 1 the last before the
question.

An item is a pure function of (seed, kind, length, depth, index) and of the text. Items that differ in depth alone have
the same haystack and the same facts, so that a curve over depths compares nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stepladder.core.errors import UserError
from stepladder.core.keys import Key, key, permute, unit
from stepladder.data.base import strings
from stepladder.data.shards import Shard
from stepladder.data.tasks.needle import CHARACTERS, FACTS, KEYS, Fact, Needle, answers
from stepladder.data.tokenizers import BOS, SPECIALS, Tokenizer

CHOICES = 4
"""Answers that the likelihoods of an item are compared over, the right one among them."""
STRAY = 16
"""A fact starts no farther from its depth than this part of the haystack's tokens."""
ROOM = 64
"""The fewest tokens of real text that make a haystack."""

KINDS: dict[str, tuple[Fact, bool]] = {
    "passkey": ("passkey", False),
    "multi_key": ("code", True),
    "word": ("word", False),
}
"""The kinds of needles: what sort of fact is asked for, and whether the other choices stand in the text too."""

_BATCH = 64  # answers or documents drawn at once


@dataclass(frozen=True)
class Item:
    """One question.

    prompt: int64 ids from BOS to the end of the question. start: the place of the fact's first token in the prompt.
    question, choices: as text; choices[0] is the right answer, ``options`` int64 [CHOICES, A] are their ids.
    """

    kind: str
    length: int
    depth: float
    index: int
    prompt: np.ndarray
    start: int
    question: str
    choices: tuple[str, ...]
    options: np.ndarray


class Documents:
    """Validation documents of one or several sources, as ids."""

    def __init__(self, shards: Sequence[Shard], tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._shards = list(shards)
        self._edges = np.cumsum([0, *(len(shard.starts) - 1 for shard in self._shards)])
        self.count = int(self._edges[-1])
        self.tokens = sum(len(shard.tokens) - 2 * (len(shard.starts) - 1) for shard in self._shards)
        pieces = tokenizer.pieces
        self._ends = np.array([piece.endswith((b".", b"!", b"?", b"\n")) for piece in pieces])
        self._opens = np.array([piece[:1].isspace() for piece in pieces])
        self._space = tokenizer.encode(" ").astype(np.int64)

    def haystack(self, secret: Key, length: int) -> np.ndarray:
        """``length`` ids of all documents in a keyed order, from a sentence of the first on; after the last document in
        another order, and so on."""
        documents = self._order(secret)
        first = next(documents)
        begin = self.place(first, float(unit((secret / "begin").words(np.zeros(1), 1))[0, 0]) * len(first), len(first))
        parts, have = [first[begin:]], len(first) - begin
        while have < length:
            parts += [self._space, next(documents)]
            have += len(self._space) + len(parts[-1])
        return np.concatenate(parts)[:length]

    def _order(self, secret: Key) -> Iterator[np.ndarray]:
        for lap in itertools.count():
            for first in range(0, self.count, _BATCH):
                places = np.arange(first, min(first + _BATCH, self.count))
                numbers = permute(secret / lap, self.count, places)
                sources = np.searchsorted(self._edges, numbers, side="right") - 1
                for source, row in zip(sources.tolist(), (numbers - self._edges[sources]).tolist(), strict=True):
                    shard = self._shards[source]
                    yield shard.tokens[shard.starts[row] + 1 : shard.starts[row + 1] - 1].astype(np.int64)

    def place(self, ids: np.ndarray, target: float, reach: int) -> int:
        """Where in a text to put something in: within ``reach`` tokens of ``target`` the nearest place at which a
        sentence ends, or else a word; or else the target itself. 0 and the end of the text are such places too."""
        if not len(ids):
            return 0
        low, high = max(0, round(target) - reach), min(len(ids), round(target) + reach)
        places = np.arange(low, high + 1)
        edge = (places == 0) | (places == len(ids))
        before, after = ids[np.maximum(places - 1, 0)], ids[np.minimum(places, len(ids) - 1)]
        word = edge | self._opens[after]
        for found in (word & (edge | self._ends[before]), word):
            if found.any():
                return int(places[found][np.abs(places[found] - target).argmin()])
        return min(max(round(target), 0), len(ids))


def spellable(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has all characters that facts are written with."""
    try:
        return tokenizer.decode(tokenizer.encode(Needle.alphabet)) == Needle.alphabet
    except UserError:  # an alphabet without a sign for what it does not have
        return False


def items(
    documents: Documents, seed: int, kind: str, length: int, depths: Sequence[float], index: int
) -> list[Item] | None:
    """The items of one index, one for every depth; None if ``length`` leaves less than ROOM tokens of real text."""
    tokenizer, secret = documents.tokenizer, key(seed, "longctx", kind, length, index)
    fact, crowded = KINDS[kind]
    text = documents.haystack(secret / "text", length)
    plain = tokenizer.decode(text)
    choices = _choices(tokenizer, secret / "answer", fact, plain)
    forms = _forms(secret / "keys", fact, plain, CHOICES if crowded else 1)
    question = _ids(tokenizer, forms[0])
    options = np.stack([_ids(tokenizer, choice) for choice in choices])
    stop = _ids(tokenizer, ".")
    stated = zip(forms, options, strict=False)  # the other choices are in the text only where there are forms for them
    needle, *others = (np.concatenate((_ids(tokenizer, form), answer, stop)) for form, answer in stated)
    around = 2 + len(question) + options.shape[1] + len(needle) + sum(map(len, others))
    if length - around < ROOM:
        return None
    text = text[: length - around]
    spots = np.sort(unit((secret / "places").words(np.arange(len(others)), 1)[:, 0])).tolist()
    found = []
    for depth in depths:
        body, start = _hidden(documents, text, needle, others, spots, depth)
        prompt = np.concatenate(([BOS], body, question))
        found.append(Item(kind, length, depth, index, prompt, 1 + start, forms[0], choices, options))
    return found


def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return tokenizer.encode(text).astype(np.int64)


def _forms(secret: Key, fact: Fact, text: str, count: int) -> list[str]:
    """How ``count`` facts about different keys begin, in words that the text does not have already."""
    order = permute(secret, len(KEYS), np.arange(len(KEYS)))
    forms = dict.fromkeys(FACTS[fact].format(KEYS[i]) for i in order.tolist())
    free = [form for form in forms if form not in text][:count]
    if len(free) < count:
        raise UserError(
            f"the validation text says '{next(iter(forms)).strip()}' itself, so nothing can be hidden in it; give the"
            " text source a 'valid' file without such sentences"
        )
    return free


def _choices(tokenizer: Tokenizer, secret: Key, fact: Fact, text: str) -> tuple[str, ...]:
    """Different answers that do not occur in a text and have equally many tokens; the first is the right one."""
    by_tokens: dict[int, list[str]] = {}
    for block in itertools.count():
        words = secret.words(np.arange(block * _BATCH, (block + 1) * _BATCH), CHARACTERS)
        for answer in strings(answers(fact, words)):
            group = by_tokens.setdefault(len(tokenizer.encode(answer)), [])
            if answer not in group and answer not in text:
                group.append(answer)
                if len(group) == CHOICES:
                    return tuple(group)
    raise AssertionError("there are more answers than a text can hold")


def _hidden(
    documents: Documents,
    text: np.ndarray,
    needle: np.ndarray,
    others: list[np.ndarray],
    spots: list[float],
    depth: float,
) -> tuple[np.ndarray, int]:
    """A text with the needle at a depth and other facts at ``spots`` (rising, in 0..1), and where the needle starts.

    The depth counts all that is around the needle, so facts before it take the place of as much text. As many go
    before it as their spots say, and as have room there.
    """
    reach = len(text) // STRAY
    target = depth * (len(text) + sum(map(len, others)))
    first = sum(spot < depth for spot in spots)
    while sum(map(len, others[:first])) > target:
        first -= 1
    while sum(map(len, others[first:])) > len(text) + sum(map(len, others)) - target:
        first += 1
    hole = documents.place(text, target - sum(map(len, others[:first])), reach)
    inside = [documents.place(text[:hole], spot / max(depth, spot) * hole, reach) for spot in spots[:first]]
    beyond = [
        hole
        + documents.place(text[hole:], (spot - depth) / (1 - depth) * (len(text) - hole) if spot > depth else 0, reach)
        for spot in spots[first:]
    ]
    places = [*inside, hole, *beyond]
    put = [*others[:first], needle, *others[first:]]
    pieces: list[np.ndarray] = []
    before = start = 0
    for number, (place, fact) in enumerate(zip(places, put, strict=True)):
        pieces.append(text[before:place])
        start = sum(map(len, pieces)) if number == first else start
        pieces.append(fact)
        before = place
    return np.concatenate([*pieces, text[before:]]), start


def flaw(item: Item, tokenizer: Tokenizer) -> str:
    """What is wrong with an item, read off its prompt alone; "" if nothing is.

    It has its length; its fact stands once, whole, within 1/STRAY of its depth (and a token, for rounding); the
    answer and what comes before it occur nowhere else; the other choices occur not at all, or, where they belong
    there, once; the end asks.
    """
    prompt, answer = item.prompt, item.options[0]
    if len(prompt) + len(answer) + 1 != item.length:
        return f"it has {len(prompt) + len(answer) + 1} tokens instead of {item.length}"
    if prompt[0] != BOS or (prompt[1:] < SPECIALS).any():
        return "a special token is inside the text"
    question = _ids(tokenizer, item.question)
    body, asked = prompt[1 : -len(question)], prompt[-len(question) :]
    if not np.array_equal(asked, question):
        return "it does not end in its question"
    fact = np.concatenate((question, answer, _ids(tokenizer, ".")))
    windows = np.lib.stride_tricks.sliding_window_view(body, min(len(fact), len(body)))
    starts = np.flatnonzero((windows == fact).all(axis=1)) if len(fact) <= len(body) else np.zeros(0)
    if len(starts) != 1:
        return f"its fact stands in the text {len(starts)} times instead of once"
    room = len(body) - len(fact)
    if abs(int(starts[0]) - item.depth * room) > room / STRAY + 1:
        return f"its fact is at depth {int(starts[0]) / room:.3f} instead of {item.depth}"
    text = tokenizer.decode(body)
    if text.count(item.question) != 1:
        return "its question stands in the text more than once"
    for number, choice in enumerate(item.choices):
        times, wanted = text.count(choice), int(number == 0 or KINDS[item.kind][1])
        if times != wanted:
            return f"{choice!r} occurs in the text {times} times instead of {wanted}"
    return ""
