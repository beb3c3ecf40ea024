"""How often randomised checks err, by the number of random symbols: ``python benchmarks/randomised.py``.

What a model can be compared with on the tasks ``freivalds`` and ``miller_rabin``: the exact computation, which errs
never, and the randomised check with the random symbols of 0, 1, 2, ... rounds, which accepts everything without any.
False accepts are a share of the wrong claims, false rejects of the right ones; ``all`` are all wrong claims of the test
split, ``hard`` those on products of two primes 2k+1 and 4k+1, of whose witnesses up to a quarter lie. The last columns
are multiplications (of entries; modulo n, or divisions), of the check and of the exact computation, by formula.
"""

from __future__ import annotations

import argparse
import sys
from math import isqrt

import numpy as np

from stepladder.data.tasks.freivalds import Freivalds
from stepladder.data.tasks.miller_rabin import MillerRabin


def hard(question: str) -> bool:
    """Whether the number of a question is a product of two primes 2k+1 and 4k+1: 8k^2 + 6k + 1."""
    n = int(question.split(";")[0].removeprefix("n="))
    k = isqrt(n // 8)
    return any((2 * j + 1) * (4 * j + 1) == n for j in (k - 1, k, k + 1))


def main() -> int:
    """Print the table; 1 if the exact computation or a check errs where it must not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=4000, help="test examples of each row")
    items = parser.parse_args().items
    print(f"{'task':<14}{'size':>5}{'rounds':>7}{'accepts: all':>14}{'hard':>8}{'rejects':>9}{'check':>8}{'exact':>10}")
    sound = True
    for kind, size in ((Freivalds, 4), (Freivalds, 8), (MillerRabin, 12)):
        for rounds in (0, 1, 2, 4, 8):
            task = kind(rounds=rounds)
            drawn = task.batch(0, "test", np.arange(items), size)
            questions, right = drawn.questions(), np.array(drawn.answers()) == "y"
            sound &= [task.solve(question) for question in questions] == drawn.answers()
            accepted = np.array([task.accepts(question) for question in questions])
            sound &= bool(accepted[right].all())
            if kind is Freivalds:
                some, check, exact = ~right, 3 * size**2 * rounds, size**3
            else:
                some = ~right & np.array([hard(question) for question in questions])
                check, exact = round(1.5 * size * np.log2(10)) * rounds, 10 ** (size // 2)
            rates = [
                accepted[~right].mean(),
                accepted[some].mean() if some.any() else np.nan,
                1 - accepted[right].mean(),
            ]
            shown = f"{100 * rates[0]:>12.2f} %{100 * rates[1]:>6.1f} %{100 * rates[2]:>7.1f} %"
            print(f"{task.kind:<14}{size:>5}{rounds:>7}{shown}{check:>8,}{exact:>10,}")
    return int(not sound)


if __name__ == "__main__":
    sys.exit(main())
