"""Examples per second of every task's generator, on one core: ``python benchmarks/generators.py``.

Before anything is timed, the oracle must agree with 200 answers of each task. The training column draws from the
default training range; the test columns draw the rarer split, one question in eight, at the largest size in the
training range and at the largest beyond it. Time is processor time of this one thread, best of several repeats, so
that other load on the machine counts little.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time

import numpy as np

from stepladder.data.base import Task
from stepladder.data.tasks import TASKS

GOALS = {"parity": 400_000, "addition": 400_000}  # examples/s in training; all others:
LEAST = 10_000


def rate(task: Task, split: str, size: int | tuple[int, int], items: int, repeats: int) -> float:
    """Examples per second of processor time, best of ``repeats`` batches of ``items``."""
    best = float("inf")
    for repeat in range(repeats):
        indices = np.arange(repeat * items, (repeat + 1) * items)
        start = time.process_time()
        task.batch(0, split, indices, size)
        best = min(best, time.process_time() - start)
    return items / best


def main() -> int:
    """Print the table; 1 if a generator is slower than its goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=65536, help="examples in a training batch")
    parser.add_argument("--repeats", type=int, default=5, help="batches timed; the best counts")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tasks = [TASKS.get(name)() for name in TASKS.names()]
    for task in tasks:
        drawn = task.batch(1, "valid", np.arange(200), task.train)
        assert [task.solve(question) for question in drawn.questions()] == drawn.answers(), task.kind

    print(f"python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}, one core")
    print(f"{'task':<16}{'train':>12}{'goal':>10}{'':>6}{'test iid':>12}{'test ood':>12}   sizes")
    slow = 0
    for task in tasks:
        goal = GOALS.get(task.kind, LEAST)
        train = rate(task, "train", task.train, options.items, options.repeats)
        iid = rate(task, "test", task.iid[-1], options.items // 16, 2)
        ood = rate(task, "test", task.ood[-1], options.items // 256, 2)
        slow += train < goal
        verdict = "ok" if train >= goal else "SLOW"
        sizes = f"{task.train[0]}-{task.train[1]} {task.axis}, {task.iid[-1]}, {task.ood[-1]}"
        print(f"{task.kind:<16}{train:>12,.0f}{goal:>10,}{verdict:>6}{iid:>12,.0f}{ood:>12,.0f}   {sizes}")
    return int(slow > 0)


if __name__ == "__main__":
    sys.exit(main())
