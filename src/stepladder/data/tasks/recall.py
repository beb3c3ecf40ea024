"""What went with what?"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.core.config import Field
from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import text, within


@task("recall")
class Recall(Task):
    """Pairs of a key and a value, then keys, whose values are asked for: multi-query associative recall.

    ``k:a1x7c2?xa=`` -> ``71``

    Size is the number of pairs: different letters, each with a uniform digit. The answer is the values of all queried
    keys in the order of the queries. The order of the pairs makes no new question. Source: Arora et al. 2023,
    "Zoology" (MQAR). Differs from it in: the queries come after all pairs, as many as ``queries`` (or as there are
    pairs), each key at most once; 26 keys and 10 values.
    """

    axis: ClassVar[str] = "pairs"
    alphabet: ClassVar[str] = "abcdefghijklmnopqrstuvwxyz0123456789:?="
    largest: ClassVar[int] = 26
    growth: ClassVar[tuple[float, ...]] = (1.25, 1.5, 2, 3)

    train: Range = (1, 8)
    queries: int = Field(4, ge=1, le=26, description="how many keys are asked for, at most one for each pair")

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        paired = within(size)
        width = paired.shape[1]
        keys = ord("a") + dice.words(26).argsort(axis=1)[:, :width]
        values = ord("0") + dice.below(10, width)
        pairs = np.where(paired[:, :, None], np.stack([keys, values], axis=2), 0).reshape(len(size), -1)

        order = np.where(paired, dice.words(width), np.uint64(2**64 - 1)).argsort(axis=1, kind="stable")
        asked = within(np.minimum(size, self.queries))
        order = order[:, : asked.shape[1]]
        queries = np.where(asked, np.take_along_axis(keys, order, axis=1), 0)
        answer = np.where(asked, np.take_along_axis(values, order, axis=1), 0)
        return Examples(text("k:", pairs, "?", queries, "="), text(answer), size)

    def canonical(self, examples: Examples) -> np.ndarray:
        pairs = examples.question[:, 2:].astype(np.int64)
        paired = within(examples.size)
        end = 2 * paired.shape[1]
        joined = np.where(paired, 256 * pairs[:, 0:end:2] + pairs[:, 1:end:2], 0)
        joined = np.sort(joined, axis=1)
        rest = np.where(np.arange(pairs.shape[1]) >= 2 * examples.size[:, None], pairs, 0)
        return text(joined // 256, joined % 256, rest)

    def solve(self, question: str) -> str:
        pairs, queries = question.removeprefix("k:").removesuffix("=").split("?")
        value = dict(zip(pairs[0::2], pairs[1::2], strict=True))
        return "".join(value[query] for query in queries)

    def chance(self, size: int) -> float:
        return 10.0 ** -self.max_answer(size)

    def max_answer(self, size: int) -> int:
        return min(size, self.queries)
