"""One fact among many sentences: what is asked for, stands somewhere above.

The words and the forms of the sentences are shared with the suite ``longctx``, which hides the same facts in real text.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from stepladder.core.keys import below
from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import text, within

Fact = Literal["passkey", "code", "word"]

FACTS: dict[Fact, str] = {"passkey": " the passkey=", "code": " the code of {}=", "word": " the word of {}="}
"""What a fact begins with, and the question repeats; {} is a key. The answer and a full stop follow."""

_NOUNS = (
    "amber anchor apple arrow basin beacon birch bridge candle canyon cedar cherry clover copper coral cotton "
    "desert dragon eagle ember falcon feather fennel forest garden ginger hammer harbor hazel heron island ivory "
    "jasper kettle ladder lantern lemon linen maple marble meadow mirror needle olive orchid oyster paddle "
    "pebble pepper pillow plover quartz raven ribbon river saddle silver spider temple thistle tiger tunnel "
    "valley willow"
)
_VERBS = "met saw found left passed kept drew held lost chose"

KEYS = tuple(_NOUNS.split())
"""Words that facts are about."""

CHARACTERS = 5
"""Length of every answer: digits of a code, letters of a made-up word."""

_LETTERS = ("bdfgklmnprstvz", "aeiou")  # of made-up words, in turn
_FILLER = len(FACTS)


def answers(fact: Fact, words: np.ndarray) -> np.ndarray:
    """Answers from random words uint64 [..., CHARACTERS], as ASCII codes uint8 of the same shape.

    A code is five uniform digits. A word is made up of consonants and vowels in turn ("lubak"), so that nothing but
    the fact tells it.
    """
    if fact != "word":
        return (ord("0") + below(words, 10)).astype(np.uint8)
    codes = [np.frombuffer(letters.encode(), np.uint8) for letters in _LETTERS]
    columns = [codes[i % 2][below(words[..., i], len(codes[i % 2]))] for i in range(CHARACTERS)]
    return np.stack(columns, axis=-1)


def possible(fact: Fact) -> int:
    """How many different answers there are."""
    consonants, vowels = map(len, _LETTERS)
    return consonants**3 * vowels**2 if fact == "word" else 10**CHARACTERS


def _table(entries: tuple[str, ...] | list[str]) -> np.ndarray:
    """Texts as ASCII codes, uint8 [entries, longest], 0-padded."""
    return np.array([entry.encode() for entry in entries]).view(np.uint8).reshape(len(entries), -1)


@task("needle")
class Needle(Task):
    """Facts and idle sentences, then the beginning of one fact, which is to be completed: a needle in a haystack.

    ``the raven met the mirror. the code of amber=48213. the word of cedar=lubak. the code of amber=`` -> ``48213``

    Size is the number of sentences, each of which begins with a space. One of them, at any place, is asked for: with
    equal chances the passkey, the code of a key or its word. Of the others about a third each are codes and words of
    other keys and idle. The order of the sentences makes no new question. Source: passkey retrieval (Mohtashami &
    Jaggi 2023); several keys as in RULER (Hsieh et al. 2024). Differs from them in: the question is the beginning of
    the fact itself, so that the answer is its exact continuation; made-up words; sentences of a small grammar in
    place of essays, which the suite ``longctx`` has.
    """

    axis: ClassVar[str] = "sentences"
    alphabet: ClassVar[str] = "abcdefghijklmnopqrstuvwxyz0123456789 .="
    largest: ClassVar[int] = len(KEYS)
    growth: ClassVar[tuple[float, ...]] = (1.5, 2, 4)

    train: Range = (1, 8)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        slots = within(size)
        n, width = slots.shape
        rows, place = np.arange(n), dice.below(size)
        fact = 1 + dice.below(_FILLER, width)  # code, word, idle
        fact[rows, place] = dice.below(_FILLER)
        key = dice.words(len(KEYS)).argsort(axis=1)[:, :width]
        words = dice.words(CHARACTERS * width).reshape(n, width, CHARACTERS)
        value = np.where((fact == 2)[:, :, None], answers("word", words), answers("code", words))
        verbs = _table(_VERBS.split())
        verb, other = dice.below(len(verbs), width), dice.below(len(KEYS), width)

        forms = [form.partition("{}")[0].removesuffix("=") for form in FACTS.values()]
        keys = _table(KEYS)
        begin = np.concatenate(
            [_table([*forms, " the "])[fact], np.where((fact > 0)[:, :, None], keys[key], 0)], axis=2
        )
        stated = _spread("=", value, ".")
        idle = _spread(" ", verbs[verb], " the ", keys[other], ".")
        end = np.where((fact == _FILLER)[:, :, None], idle, _widened(stated, idle.shape[2]))
        sentences = np.where(slots[:, :, None], np.concatenate([begin, end], axis=2), 0)
        question = text(sentences.reshape(n, -1), begin[rows, place], "=")
        return Examples(question, value[rows, place], size)

    def canonical(self, examples: Examples) -> np.ndarray:
        ordered = [".".join(sorted(s.strip() for s in question.split("."))) for question in examples.questions()]
        return _table(ordered)

    def solve(self, question: str) -> str:
        *sentences, asked = question.split(".")
        return dict(s.strip().split("=") for s in sentences if "=" in s)[asked.strip(" =")]

    def chance(self, size: int) -> float:
        return 1 / (possible("code") + possible("word"))

    def max_answer(self, size: int) -> int:
        return CHARACTERS


def _spread(*parts: str | np.ndarray) -> np.ndarray:
    """Parts [n, sentences, anything] side by side, literals repeated for every sentence."""
    n, width = next(part.shape[:2] for part in parts if not isinstance(part, str))
    columns = [np.broadcast_to(_table([p]), (n, width, len(p))) if isinstance(p, str) else p for p in parts]
    return np.concatenate(columns, axis=2)


def _widened(matrix: np.ndarray, width: int) -> np.ndarray:
    """The matrix with zeros on its last axis up to a width."""
    return np.pad(matrix, [(0, 0)] * (matrix.ndim - 1) + [(0, width - matrix.shape[-1])])
