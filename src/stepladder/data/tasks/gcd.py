"""What divides both?"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, task
from stepladder.data.programs import Program
from stepladder.data.symbols import decimals, text


@task("gcd")
class Gcd(Program):
    """The greatest common divisor of two natural numbers, the larger one first.

    ``a=84; b=36; gcd=`` -> ``12``

    Size is the number of digits of the larger number. Both are multiples of a number whose count of digits is uniform;
    two uniform numbers are coprime three times in five. Source: Euclid's algorithm; of the kind of VecTur's CompGen.
    Differs from it in: two numbers instead of an array.
    """

    complexity: ClassVar[str] = "O(n) steps for n digits, O(1) space"
    axis: ClassVar[str] = "digits"
    alphabet: ClassVar[str] = "0123456789;= abgcd"
    largest: ClassVar[int] = 18  # what 64 bits hold
    growth: ClassVar[tuple[float, ...]] = (1.25, 1.5, 2)

    train: Range = (2, 6)

    def sized(self, length: int) -> int:
        return max(1, min(length // 8, self.largest))

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        digits = 1 + dice.below(size)
        common = _uniform(dice, 10 ** (digits - 1), 10**digits - 1)
        least, most = 10 ** (size - 1), 10**size - 1
        a = common * _uniform(dice, -(-least // common), most // common)
        b = common * _uniform(dice, np.ones_like(common), a // common)
        numbers = (decimals(number[:, None])[:, 0] for number in (a, b, np.gcd(a, b)))
        return Examples(text("a=", next(numbers), "; b=", next(numbers), "; gcd="), text(next(numbers)), size)

    def solve(self, question: str) -> str:
        a, b = (int(part.split("=")[1]) for part in question.removesuffix("; gcd=").split("; "))
        while b:
            a, b = b, a % b
        return str(a)

    def chance(self, size: int) -> float:
        return 1 / (10**size - 1)

    def max_answer(self, size: int) -> int:
        return size


def _uniform(dice: Dice, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Uniform int64 in [low, high], for bounds that 32 bits do not hold (bias below 1 in 15 at 18 digits)."""
    return low + (dice.words(1)[:, 0] % (high - low + 1).astype(np.uint64)).astype(np.int64)
