"""CompGen examples per second on one core, written to JSON lines: ``python benchmarks/compgen.py``.

Before anything is timed, a small dataset is verified: every answer by the independent solver, splits, duplicates. Timed
is the whole of ``stepladder data compgen generate`` with all tasks and its default sizes (all splits, drawing, removing
duplicates, mixing, writing, hashing), in processor time of this one thread, best of several, so that other load on the
machine counts little. By task: the same with that task alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from stepladder.data.compgen import generate, names, total, verify

GOAL = 94_000  # examples/s over all tasks: twenty times those of the system it replaces


def rate(tasks: list[str], size: int, repeats: int) -> float:
    """Examples per second of processor time, best of ``repeats``."""
    tree, best = {"tasks": tasks, "dataset_size": size}, float("inf")
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            generate(tree, Path(folder) / "made")
            best = min(best, time.process_time() - start)
    return total(tree) / best


def main() -> int:
    """Print the table; 1 if all tasks together are slower than the goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=50_000, help="examples of each task")
    parser.add_argument("--repeats", type=int, default=3, help="datasets timed; the best counts")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        generate({"tasks": ["all"], "dataset_size": 300}, Path(folder) / "made")
        verify(Path(folder) / "made")

    print(f"python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}, one core")
    for name in names():
        print(f"{name:<20}{rate([name], options.size // 4, options.repeats):>12,.0f}")
    found = rate(["all"], options.size, options.repeats)
    print(f"{'all':<20}{found:>12,.0f}   goal {GOAL:,}: {'ok' if found >= GOAL else 'SLOW'}")
    return int(found < GOAL)


if __name__ == "__main__":
    sys.exit(main())
