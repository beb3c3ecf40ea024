"""Nested operations on lists of digits."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.core.config import Field
from stepladder.data.base import Dice, Examples, Range, Task, task
from stepladder.data.symbols import text, within

_OPERATORS = np.frombuffer(b"xnms", np.uint8)


@task("listops")
class ListOps(Task):
    """The value of a tree of list operations: x maximum, n minimum, m median (rounded down), s sum modulo 10.

    ``(x4(s79)1)=`` -> ``6``: the maximum of 4, (7 + 9) mod 10 and 1

    Size is the number of operations. The tree grows by turning a random digit into an operation, so that all shapes
    occur; the nesting grows slowly (about 4 levels at size 6, 9 at 48). Source: Nangia & Bowman 2018, "ListOps".
    Differs from it in: one character for a token, the size as the axis instead of the depth. The order of operands is
    not undone in the canonical form: ``(x12)`` and ``(x21)`` are two questions.
    """

    axis: ClassVar[str] = "operations"
    alphabet: ClassVar[str] = "0123456789xnms()="
    largest: ClassVar[int] = 128

    train: Range = (1, 6)
    operands: int = Field(4, ge=2, le=5, description="most operands of an operation; the least is 2")

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        n, most, wide = len(size), int(size.max()), self.operands
        rows = np.arange(n)
        values = dice.below(10, 1 + most * wide)  # of leaf 0, the root, and of the operands of each operation
        operators, counts, picks = dice.below(4, most), 2 + dice.below(wide - 1, most), dice.words(most)
        used = np.arange(wide) < counts[:, :, None]
        own = [slice(1 + k * wide, 1 + (k + 1) * wide) for k in range(most)]

        # Grow: operation k turns up in the place of one of the leaves there are, which brings its own in return.
        replaced = np.zeros((n, most), np.int64)
        leaves, number = np.zeros((n, 1 + most * wide), np.int64), np.ones(n, np.int64)
        for k in range(most):
            pick = (picks[:, k] % number.astype(np.uint64)).astype(np.int64)
            replaced[:, k] = leaves[rows, pick]
            leaves[rows, pick] = np.where(k < size, own[k].start, replaced[:, k])
            leaves[rows[:, None], number[:, None] + np.arange(wide - 1)] = own[k].start + 1 + np.arange(wide - 1)
            number += np.where(k < size, counts[:, k] - 1, 0)

        # Measure and evaluate, from the last to the first: what grew last has nothing but digits in it.
        digits, lengths = values.copy(), np.ones_like(values)
        for k in reversed(range(most)):
            at, real = (rows, replaced[:, k]), k < size
            value = _apply(operators[:, k], values[:, own[k]], used[:, k])
            values[at] = np.where(real, value, values[at])
            lengths[at] = np.where(real, 3 + (lengths[:, own[k]] * used[:, k]).sum(axis=1), lengths[at])

        # Write: "(", operator, operands, ")". What is not there goes to the last column, which is cut off.
        end = int(lengths[:, 0].max())
        tree, starts = np.zeros((n, end + 1), np.uint8), np.zeros_like(values)
        for k in range(most):
            start, length = starts[rows, replaced[:, k]], lengths[rows, replaced[:, k]]
            inside = np.cumsum(lengths[:, own[k]], axis=1) - lengths[:, own[k]]
            starts[:, own[k]] = start[:, None] + 2 + inside
            for place, symbol in ((0, ord("(")), (1, _OPERATORS[operators[:, k]]), (length - 1, ord(")"))):
                tree[rows, np.where(k < size, start + place, end)] = symbol
        places = np.where(within(number), np.take_along_axis(starts, leaves[:, : number.max()], axis=1), end)
        shown = np.take_along_axis(digits, leaves[:, : number.max()], axis=1) + ord("0")
        np.put_along_axis(tree, places, shown.astype(np.uint8), axis=1)
        return Examples(text(tree[:, :end], "="), text(values[:, :1] + ord("0")), size)

    def solve(self, question: str) -> str:
        tokens = iter(question)

        def value(token: str) -> int:
            if token.isdigit():
                return int(token)
            operator, operands = next(tokens), []
            while (token := next(tokens)) != ")":
                operands.append(value(token))
            ordered = sorted(operands)
            median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2
            return {"x": ordered[-1], "n": ordered[0], "m": median, "s": sum(ordered) % 10}[operator]

        return str(value(next(tokens)))

    def chance(self, size: int) -> float:
        return 1 / 10

    def max_answer(self, size: int) -> int:
        return 1


def _apply(operator: np.ndarray, operands: np.ndarray, used: np.ndarray) -> np.ndarray:
    """The value [n] of one operation a row: ``operator`` [n] (place in "xnms") on the ``used`` operands [n, wide]."""
    ordered = np.sort(np.where(used, operands, 10), axis=1)
    rows, count = np.arange(len(used)), used.sum(axis=1)
    median = (ordered[rows, (count - 1) // 2] + ordered[rows, count // 2]) // 2
    total = np.where(used, operands, 0).sum(axis=1) % 10
    return np.choose(operator, [ordered[rows, count - 1], ordered[:, 0], median, total])
