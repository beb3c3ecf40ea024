"""Examples packed into rows of equal length: a row is a pure function of its number.

Row r of a task is filled with the examples r * S, r * S + 1, ... (S = ``stride``: more than ever fit), each
``[BOS] question answer [EOS]`` and a document of its own, until one does not fit; what is left is PAD. Supervised are
the answer and EOS, so the first target of an example stands at the last token of its question.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stepladder.core.errors import UserError
from stepladder.data.base import Examples, Task
from stepladder.data.tokenizers import BOS, EOS, IGNORE, PAD, Tokenizer

_PROBE = 2048  # examples looked at for the longest


@dataclass(frozen=True)
class Encoded:
    """Examples as ids: ``question`` [n, Q] and ``answer`` [n, A] padded with PAD, and the tokens in each [n]."""

    question: np.ndarray
    question_tokens: np.ndarray
    answer: np.ndarray
    answer_tokens: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Tokens of each example, BOS and EOS included: int64 [n]."""
        return self.question_tokens + self.answer_tokens + 2


def encode(examples: Examples, tokenizer: Tokenizer) -> Encoded:
    """Questions and answers encoded apart, so that no token spans the two."""
    return Encoded(*tokenizer.encode_many(examples.question), *tokenizer.encode_many(examples.answer))


def stride(length: int) -> int:
    """How far apart the first examples of neighbouring rows are: no example has less than 4 tokens."""
    return length // 4 + 1


def probe(task: Task, tokenizer: Tokenizer, length: int) -> float:
    """The mean tokens of a training example; UserError if one does not fit into rows of ``length`` tokens."""
    high = task.train[1]
    needed = int(encode(task.batch(0, "train", np.arange(_PROBE), high), tokenizer).total.max())
    if needed > length:
        raise _too_long(task, high, needed, length)
    return float(encode(task.batch(0, "train", np.arange(256), task.train), tokenizer).total.mean())


def _too_long(task: Task, size: int, needed: int, length: int) -> UserError:
    return UserError(
        f"an example of task '{task.kind}' with {size} {task.axis} has {needed} tokens and does not fit into rows of"
        f" {length}; set data.sequence to at least {needed} or train on smaller sizes"
    )


def pack(
    task: Task,
    seed: int,
    rows: np.ndarray,
    sizes: tuple[int, int],
    tokenizer: Tokenizer,
    length: int,
    typical: float = 16.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows ``rows`` [B] of a task's training split, sizes uniform in a range: int64 (tokens, targets, documents).

    Each is ``[B, length]``. Documents are numbered from 0 in each row; padding is the last. Row i depends on (seed,
    rows[i], sizes, length) only; ``typical`` tokens of an example is a hint that saves time. An example longer than a
    row is a UserError, never cut or skipped. (Ending at the first example that does not fit shows long examples a
    little less often than short ones; the longer the rows, the less.)
    """
    rows = np.asarray(rows, dtype=np.int64)
    canvas = _Canvas(len(rows), length)
    used = np.zeros(len(rows), dtype=np.int64)  # tokens in each row
    unfinished = np.arange(len(rows))
    first, wave = 0, int(1.1 * length / typical) + 2  # every unfinished row takes ``wave`` examples from ``first`` on
    while unfinished.size:
        wave = min(wave, stride(length) - first)
        indices = rows[unfinished, None] * stride(length) + first + np.arange(wave)
        examples = task.batch(seed, "train", indices.reshape(-1), sizes)
        encoded = encode(examples, tokenizer)
        totals = encoded.total.reshape(-1, wave)
        ends = used[unfinished, None] + np.cumsum(totals, axis=1)
        fits = ends <= length
        reached = np.concatenate([np.ones((len(fits), 1), dtype=bool), fits[:, :-1]], axis=1)
        if (wrong := np.flatnonzero(reached & (totals > length))).size:
            worst = wrong[totals.reshape(-1)[wrong].argmax()]
            raise _too_long(task, int(examples.size[worst]), int(totals.reshape(-1)[worst]), length)
        canvas.paint(encoded, unfinished, ends - totals, fits)
        used[unfinished] = np.where(fits, ends, used[unfinished, None]).max(axis=1)
        unfinished = unfinished[fits.all(axis=1)]
        first, wave = first + wave, max(2, wave // 4)
    return canvas.finish(used)


class _Canvas:
    """Rows being filled, with one more column than wanted, so that what ends at the edge needs no special case."""

    def __init__(self, rows: int, length: int) -> None:
        self.length, self.width = length, length + 1
        self.tokens = np.full(rows * self.width, PAD, dtype=np.int64)
        self.supervised = np.zeros(rows * self.width, dtype=bool)
        self.begins = np.zeros(rows * self.width, dtype=bool)

    def paint(self, encoded: Encoded, rows: np.ndarray, starts: np.ndarray, chosen: np.ndarray) -> None:
        """Put the chosen examples (bool [rows, wave]) at column ``starts`` of their rows."""
        begin = (rows[:, None] * self.width + starts)[chosen]
        picked = chosen.reshape(-1)
        self.tokens[begin], self.begins[begin] = BOS, True
        answer = begin + 1 + encoded.question_tokens[picked]
        self._text(encoded.question[picked], encoded.question_tokens[picked], begin + 1)
        self.supervised[self._text(encoded.answer[picked], encoded.answer_tokens[picked], answer)] = True
        end = answer + encoded.answer_tokens[picked]
        self.tokens[end], self.supervised[end] = EOS, True

    def _text(self, ids: np.ndarray, counts: np.ndarray, places: np.ndarray) -> np.ndarray:
        column = np.arange(ids.shape[1])
        inside = column < counts[:, None]
        cells = (places[:, None] + column)[inside]
        self.tokens[cells] = ids[inside]
        return cells

    def finish(self, used: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, targets, documents), given how many tokens each row has; what is beyond is a document too."""
        self.begins[np.arange(len(used)) * self.width + used] = True
        tokens, supervised, begins = (
            array.reshape(len(used), self.width) for array in (self.tokens, self.supervised, self.begins)
        )
        targets = np.where(supervised[:, 1:], tokens[:, 1:], IGNORE)
        return tokens[:, : self.length].copy(), targets, np.cumsum(begins[:, : self.length], axis=1) - 1
