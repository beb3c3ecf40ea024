"""Pairs from a file: how fast, and in how much memory: ``python benchmarks/pairs.py``.

A file of CompGen is made, opened as a source of pairs (the first time its tokens are made, the second they are in the
cache), and batches of 32 rows of 1,024 bytes are drawn. Timed is processor time; memory is the largest resident set of
a process that does nothing else, above what it has before it opens the file (Linux only).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from stepladder.core.config import validate
from stepladder.data.compgen import generate
from stepladder.data.stream import DataConfig, Stream


def most() -> float:
    """The largest resident set of this process so far, in MB."""
    return float(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def measure(file: Path, cache: Path) -> str:
    """One line: opening, memory, examples per second."""
    templates = {"question": "task={task}\n{x}\n", "answer": "{y}", "group": "{task}", "size": "{meta[n]}"}
    tree = {"sources": [{"kind": "pairs", "path": str(file), **templates}], "sequence": 1024}
    before, start = most(), time.process_time()
    stream = Stream(validate(DataConfig, tree, "benchmark"), 0, cache)
    opened, memory = time.process_time() - start, most() - before
    examples, start = 0, time.process_time()
    for step in range(200):
        examples += int((stream.batch(step, np.arange(32), 32).documents.max(axis=1) + 1).sum())
    rate = examples / (time.process_time() - start)
    return f"opened in {opened:.1f} s, {memory:,.0f} MB more; {rate:,.0f} examples/s"


def main() -> int:
    """Print what was measured, each time in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=30_000, help="examples of each of CompGen's tasks")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(*options.measure))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        meta = generate({"tasks": ["all"], "dataset_size": options.size}, made)
        train = meta["splits"]["train"]
        print(f"{train['examples']:,} pairs, {train['bytes'] / 1e6:,.0f} MB")
        for what in ("first", "again"):
            command = [sys.executable, __file__, "--measure", str(made / "train.jsonl"), str(Path(folder) / "cache")]
            print(f"{what}: {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
