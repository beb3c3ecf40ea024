"""Text and whole numbers as matrices, a batch at a time: what the tasks draw their questions with.

A text is a uint8 matrix of ASCII codes, one row each, in which 0 means "nothing here". A number is an int64 matrix of
decimal digits, least significant first, so that numbers of any length add and multiply column by column.
"""

from __future__ import annotations

import numpy as np

from stepladder.data.dice import Dice


def text(*parts: str | np.ndarray) -> np.ndarray:
    """Texts written one after the other: uint8 [n, L], zeros squeezed out and moved to the right.

    A part is a literal, the same in every row, or a matrix of ASCII codes [n, anything]; zeros in it are skipped.
    """
    n = next(len(part) for part in parts if not isinstance(part, str))
    columns = [_literal(part, n) if isinstance(part, str) else part for part in parts]
    wide = np.concatenate(columns, axis=1, dtype=np.uint8, casting="unsafe")
    present = wide != 0
    lengths = present.sum(axis=1, dtype=np.int32)
    packed = np.zeros((n, int(lengths.max(initial=0))), np.uint8)
    packed[within(lengths)] = wide.reshape(-1).take(np.flatnonzero(present))  # five times as fast as wide[present]
    return packed


def _literal(part: str, n: int) -> np.ndarray:
    return np.broadcast_to(np.frombuffer(part.encode("ascii"), np.uint8), (n, len(part)))


def within(sizes: np.ndarray) -> np.ndarray:
    """``[[column < size]]``: bool [n, sizes.max()], the cells that rows of these sizes fill."""
    return np.arange(sizes.max(initial=0), dtype=sizes.dtype) < sizes[:, None]


def number(dice: Dice, digits: np.ndarray, width: int) -> np.ndarray:
    """Random numbers [n, width] of exactly so many ``digits`` [n]: no leading 0, except that 0 itself has one digit."""
    drawn = np.where(np.arange(width) < digits[:, None], dice.below(10, width), 0)
    leading = (np.arange(len(digits)), digits - 1)
    drawn[leading] = np.where(digits > 1, 1 + dice.below(9), drawn[leading])
    return drawn


def digits_of(values: np.ndarray) -> np.ndarray:
    """The decimal digits, least significant first, of non-negative int64 values [n]."""
    width = len(str(int(values.max(initial=0))))
    return values[:, None] // 10 ** np.arange(width) % 10


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of two numbers of any width, carried; one column wider than the wider of them."""
    columns = np.zeros((len(a), max(a.shape[1], b.shape[1]) + 1), np.int64)
    columns[:, : a.shape[1]] += a
    columns[:, : b.shape[1]] += b
    return carry(columns)


def carry(columns: np.ndarray) -> np.ndarray:
    """Columns that hold more than a digit, made into digits. The last column must have room for the last carry."""
    digits = columns.T.copy()  # a column at a time: contiguous this way round
    for column in range(len(digits) - 1):
        tens = digits[column] // 10
        digits[column] -= 10 * tens
        digits[column + 1] += tens
    return digits.T


def numeral(digits: np.ndarray) -> np.ndarray:
    """Numbers as text, most significant digit first, without leading zeros (zero is "0"); not yet squeezed."""
    first = digits[:, ::-1]
    shown = np.logical_or.accumulate(first != 0, axis=1)
    shown[:, -1] = True
    return np.where(shown, first + ord("0"), 0).astype(np.uint8)


def until(question: np.ndarray, mark: str) -> np.ndarray:
    """What stands before the first ``mark`` in every row; the rest becomes 0."""
    return np.where(np.arange(question.shape[1]) < (question == ord(mark)).argmax(axis=1)[:, None], question, 0)


def sorted_operands(question: np.ndarray, sign: str, end: str = "=") -> np.ndarray:
    """``b+a=`` and ``a+b=`` as one and the same text: the two operands around ``sign`` in a fixed order."""
    n, width = question.shape
    column = np.arange(width)
    at = (question == ord(sign)).argmax(axis=1)[:, None]
    stop = (question == ord(end)).argmax(axis=1)[:, None]
    left = np.where(column < at, question, 0)
    right = np.take_along_axis(question, np.minimum(column + at + 1, width - 1), axis=1)
    right = np.where(column < stop - at - 1, right, 0)
    first = (np.arange(n), (left != right).argmax(axis=1))  # where they first differ
    swap = left[first] > right[first]
    ordered = question.copy()
    rest = np.where(column >= stop, question, 0)[swap]
    swapped = text(right[swap], sign, left[swap], rest)
    ordered[swap, : swapped.shape[1]] = swapped
    return ordered


def decimals(values: np.ndarray, present: np.ndarray | None = None, before: str = "") -> np.ndarray:
    """Signed integers of any shape in decimal: ASCII codes [..., W], right-aligned, 0 where there is nothing.

    Numbers that are not ``present`` (bool, of the same shape) are all 0; ``before`` is a character in front of each.
    """
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if high - low < values.size:  # spell every different number once, and nothing once
        spelled = _spelled(np.arange(low, high + 2), before)
        spelled[-1] = 0
        numbers = values - low
        return spelled.take(numbers if present is None else np.where(present, numbers, high + 1 - low), axis=0)
    codes = _spelled(values, before)
    if present is not None:
        codes[~present] = 0
    return codes


def _spelled(values: np.ndarray, before: str) -> np.ndarray:
    rest = np.abs(values)
    width, lead = len(str(int(rest.max(initial=0)))), len(before)
    codes = np.zeros((*values.shape, lead + 1 + width), np.uint8)
    if before:
        codes[..., 0] = ord(before)
    codes[..., lead] = np.where(values < 0, ord("-"), 0)
    for place in range(width):
        digit = np.where((rest > 0) | (place == 0), rest % 10 + ord("0"), 0)
        codes[..., -1 - place] = digit
        rest //= 10
    return codes


def joined(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The ``present`` integers [n, m] of every row, joined by commas; column 0 must be present: codes [n, anything]."""
    cells = decimals(values, present, ",")
    cells[:, 0, 0] = 0
    return cells.reshape(len(values), -1)
