"""Is this a prime?"""

from __future__ import annotations

import itertools
from functools import lru_cache
from math import isqrt
from typing import ClassVar

import numpy as np

from stepladder.data.base import Dice, Examples, Range, task
from stepladder.data.programs import Claim
from stepladder.data.symbols import decimals, joined, text, until

_BASES = {2: 0, 3: 2047, 5: 1_373_653, 7: 25_326_001, 11: 3_215_031_751}
# No composite below a number is a strong pseudoprime to all bases before it, none below 2.1e12 to all (Jaeschke 1993).
_OTHERS = {base: least for base, least in _BASES.items() if base > 2}
_SMALL = 223092870, 614889782588491410  # products of the primes up to 23, and up to 47
_COPRIME = np.array([1, 7, 11, 13, 17, 19, 23, 29])  # to 30
_BLOCKS = (0, 2, 6, 16, 40)  # numbers looked at together until one is right: the first of a block, and of the next
_RARE = 20_000  # each of the products below is one in so many composites: not often enough to upset the balance


@task("miller_rabin")
class MillerRabin(Claim):
    """Whether a number is a prime: y or n.

    ``n=10007; prime=`` -> ``y``, ``n=49141; prime=`` -> ``n``

    Size is the number of digits. Composites have no factor up to 47 (23 at 5 digits): that leaves about as many as
    there are primes, and no last digit or sum of digits that tells. Up to a fifth of them, fewer where there are few,
    are products of two primes 2k+1 and 4k+1: of the numbers below such an n up to a quarter, the most there can be, are
    liars for the check of Miller and Rabin, while to most other composites hardly any number is. A fixed method tries
    divisors. With ``rounds`` random numbers below n in the question (``n=49141; w=14,1500; prime=``) the check is wrong
    about such a product once in 4^rounds or somewhat less often. Source: Miller 1976, Rabin 1980; of VecTur's
    randomised suite. Differs from it in: which composites are asked about.
    """

    complexity: ClassVar[str] = "O(n^3) time with random numbers, O(10^(n/2)) by division; O(n) space"
    axis: ClassVar[str] = "digits"
    alphabet: ClassVar[str] = "0123456789,;= nwprimey"
    smallest: ClassVar[int] = 5
    largest: ClassVar[int] = 12  # what _BASES and doubles are enough for
    growth: ClassVar[tuple[float, ...]] = (1.25, 1.5, 2)

    train: Range = (5, 8)

    def sized(self, length: int) -> int:
        return min(5 + length // 16, self.largest)

    def draw(self, dice: Dice, size: np.ndarray) -> Examples:
        prime = dice.below(2) == 1
        hard = dice.below(_RARE)
        witnesses = dice.words(self.rounds)
        words = dice.words(_BLOCKS[-1])
        n = np.zeros(len(size), np.int64)
        for digits in np.unique(size).tolist():
            products = _products(digits)
            mine = np.flatnonzero((size == digits) & ~prime & (hard < len(products)))
            n[mine] = products[hard[mine]]
        for first, last in itertools.pairwise(_BLOCKS):
            missing = np.flatnonzero(n == 0)
            numbers = _rough(words[missing, first:last], size[missing])
            right = numbers > 0
            right[right] = _strong(numbers[right], 2) == prime[missing][np.nonzero(right)[0]]
            n[missing] = np.where(right.any(axis=1), numbers[np.arange(len(missing)), right.argmax(axis=1)], 0)
        sure = np.where(prime, _is_prime(n, _OTHERS), n > 0)  # else, hardly ever, draw again
        question: list[str | np.ndarray] = [text("n=", decimals(n[:, None])[:, 0])]
        if self.rounds:
            bases = 2 + (witnesses % np.maximum(n - 3, 1)[:, None].astype(np.uint64)).astype(np.int64)
            question += ["; w=", joined(bases, np.ones(bases.shape, bool))]
        answer = np.where(sure, np.where(prime, ord("y"), ord("n")), 0)[:, None].astype(np.uint8)
        return Examples(text(*question, "; prime="), answer, size)

    def canonical(self, examples: Examples) -> np.ndarray:
        return until(examples.question, ";")

    def solve(self, question: str) -> str:
        n = int(question.split(";")[0].removeprefix("n="))
        divisors = _primes(10 ** -(-len(str(n)) // 2))
        return "n" if (n % divisors[: np.searchsorted(divisors, isqrt(n), side="right")] == 0).any() else "y"

    def accepts(self, question: str) -> bool:
        n, *given = (part.split("=")[1] for part in question.removesuffix("; prime=").split("; "))
        return all(_passes(int(n), int(base)) for part in given for base in part.split(","))


def _passes(n: int, base: int) -> bool:
    """The check of Miller and Rabin, in plain Python: what a prime n passes with every base."""
    twos = ((n - 1) & (1 - n)).bit_length() - 1
    power = pow(base, n >> twos, n)
    return power == 1 or any(pow(power, 1 << times, n) == n - 1 for times in range(twos))


@lru_cache
def _primes(limit: int) -> np.ndarray:
    """All primes up to ``limit``, rising (the sieve of Eratosthenes)."""
    open_ended = np.ones(limit + 1, bool)
    open_ended[:2] = False
    for number in range(2, isqrt(limit) + 1):
        if open_ended[number]:
            open_ended[number * number :: number] = False
    return np.flatnonzero(open_ended)


@lru_cache
def _products(digits: int) -> np.ndarray:
    """All products of primes 2k+1 and 4k+1 of so many digits."""
    k = np.arange(1, isqrt(10**digits // 8) + 1)
    n = (2 * k + 1) * (4 * k + 1)
    k = k[(10 ** (digits - 1) <= n) & (n < 10**digits)]
    k = k[_is_prime(2 * k + 1)]
    k = k[_is_prime(4 * k + 1)]
    return (2 * k + 1) * (4 * k + 1)


def _rough(words: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """The number of so many ``digits`` [n] that each of the words [n, m] stands for; 0 if it has a small factor."""
    low, high = 10 ** (digits - 1), 10**digits
    start = low // 30
    place = (words % (8 * (high // 30 + 1 - start)).astype(np.uint64)[:, None]).astype(np.int64)
    n = 30 * (start[:, None] + place // 8) + _COPRIME[place % 8]
    fits = (
        (np.gcd(n, np.where(digits > 5, _SMALL[1], _SMALL[0])[:, None]) == 1)
        & (n >= low[:, None])
        & (n < high[:, None])
    )
    return np.where(fits, n, 0)


def _is_prime(n: np.ndarray, bases: dict[int, int] = _BASES) -> np.ndarray:
    """Which of these numbers, 0 or odd and below 10^12, are primes: bool [n]."""
    found = n > 1
    for base, least in bases.items():  # few composites get beyond the first
        left = np.flatnonzero(found & (n != base) & (n >= least))
        found[left] = _strong(n[left], base)
    return found


def _strong(n: np.ndarray, base: int) -> np.ndarray:
    """The check of Miller and Rabin for many odd numbers at once.

    A square modulo n is taken without division: the quotient in doubles, less a half, is the right one or one less, and
    what is left, exact modulo 2^64, is below 2n. That holds for up to 2 base n: less than 2^45.
    """
    twos = (n - 1) & (1 - n)
    odd, inverse = (n - 1) // twos, 1 / n
    left = np.ones_like(n)

    def square(a: np.ndarray) -> np.ndarray:
        about = a.astype(float)
        about *= about
        about *= inverse
        about -= 0.5
        quotient = about.astype(np.int64)
        quotient *= n
        return a * a - quotient

    for bit in range(int(odd.max(initial=0)).bit_length() - 1, -1, -1):
        left = square(left)
        left *= (odd >> bit & 1) * (base - 1) + 1
    left %= n
    passed = (left == 1) | (left == n - 1)
    while (twos := twos >> 1).max(initial=0) > 1:
        left = square(left) % n
        passed |= (left == n - 1) & (twos > 1)
    return passed
