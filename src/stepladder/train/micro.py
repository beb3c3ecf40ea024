"""How many rows are walked at a time: ``train.micro``, given or chosen by memory.

What a step is, its ``train.batch`` rows, never depends on memory: the same data for every rung, everywhere. What is
chosen is how many of them go through the model at once, the gradients of the rest being added up. With ``micro: auto``
that is the largest divisor of the batch whose step, measured on fake tensors (``memory.training``), fits into
``train.memory``, or else into a share of what the device has free as the run begins.

The choice is kept in ``micro.json`` of the run, since sums in another order are other bits: a run that goes on has the
rows it had, step by step. A new choice comes with another device, and with a step that runs out of memory in spite of
all: that is begun anew with the next smaller divisor, before anything of it was applied.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from stepladder.core.errors import UserError
from stepladder.core.files import read_json, write_json
from stepladder.run import Run, TrainConfig
from stepladder.train.memory import training
from stepladder.train.provenance import device_name

SHARE = {"cuda": 0.85, "cpu": 0.5}
"""Of what is free, how much a step may take: others want memory of a CPU, too, such as further runs at a time."""
GIB = 1 << 30


class Micro:
    """The rows of a micro-batch, by step. ``choices``: [{step, rows, why, ...}, ...] in rising order of steps."""

    def __init__(self, train: TrainConfig, choices: list[dict[str, Any]], fresh: dict[str, Any] | None = None) -> None:
        self.train, self.choices, self._fresh = train, choices, fresh
        self._path: Path | None = None

    @staticmethod
    def of(run: Run, vocab: int, run_dir: Path, device: torch.device) -> Micro:
        """Those of a run's directory; chosen, and not yet written, if it has none or they are of another device."""
        if run.train.micro != "auto":
            return Micro(run.train, [])
        path, name = run_dir / "micro.json", device_name(device)
        known: list[dict[str, Any]] = read_json(path)["choices"] if path.exists() else []
        if known and known[-1]["device"] == name:
            return Micro(run.train, known)
        return Micro(run.train, known, {**choose(run, vocab, device), "device": name})

    def keep(self, run_dir: Path, step: int) -> None:
        """Write down what was chosen, for ``step`` and after; from here on every choice is written at once."""
        if self.train.micro == "auto":
            self._path = run_dir / "micro.json"
        if self._fresh:
            self._note(step, self._fresh)

    def at(self, step: int) -> TrainConfig:
        """How the step after ``step`` is trained: ``train`` as it is at that step, with a number in place of "auto"."""
        held = [entry["rows"] for entry in self.choices if entry["step"] <= step]
        rows = held[-1] if held else self._fresh["rows"] if self._fresh else None
        train = self.train.at(step)
        return train if rows is None else train.model_copy(update={"micro": rows})

    def shrink(self, step: int, cause: str) -> dict[str, Any]:
        """After a step that ran out of memory: fewer rows, as an event for the metrics; a UserError if there are none
        fewer, or if their number was given."""
        rows = self.at(step).at_once(self.train.batch)
        fewer = [divisor for divisor in _divisors(self.train.batch) if divisor < rows]
        if self.train.micro != "auto" or not fewer:
            way = f"set train.micro={fewer[0]}, train.micro=auto or" if fewer else "make data.sequence shorter, or set"
            raise UserError(
                f"step {step + 1} ran out of memory with {rows} rows at a time ({cause}); nothing of it was applied;"
                f" {way} train.recompute=true"
            )
        device = self.choices[-1]["device"] if self.choices else None
        self._note(step, {"rows": fewer[0], "why": cause, "device": device})
        return {"step": step + 1, "event": "fewer rows at a time", "rows": fewer[0], "cause": cause}

    def _note(self, step: int, choice: dict[str, Any]) -> None:
        self._fresh = None
        self.choices = [*(c for c in self.choices if c["step"] < step), {"step": step, **choice}]
        if self._path is not None:
            write_json(self._path, {"choices": self.choices})


def choose(run: Run, vocab: int, device: torch.device) -> dict[str, Any]:
    """The most rows at a time whose step fits: ``rows``, ``peak_bytes`` of the step, ``room_bytes``, ``why``.

    A function of the run and ``train.memory``, where that is given. A UserError if a single row does not fit.
    """
    train = run.train
    if train.memory is None:
        free = available(device)
        room, why = int(SHARE[device.type] * free), f"{SHARE[device.type]:.0%} of {free / GIB:.3g} GiB free"
    else:
        room, why = int(train.memory * GIB), f"train.memory={train.memory:g} GiB"
    peak = 0
    for rows in _divisors(train.batch):
        # Two micro-batches have what any more have: gradients that lie there while the next is walked.
        several = min(2 * rows, train.batch)
        with torch.random.fork_rng(devices=[]):
            asked = train.model_copy(update={"micro": rows})
            peak = training(run.model, vocab, several, run.data.sequence, asked).peak
        if peak <= room:
            return {"rows": rows, "peak_bytes": peak, "room_bytes": room, "why": why}
    raise UserError(
        f"a step takes {peak / GIB:.3g} GiB with a single row at a time, and there are {room / GIB:.3g} ({why});"
        " make the model or data.sequence smaller, or set train.recompute=true"
    )


def available(device: torch.device) -> int:
    """Bytes that are free on a device; of a CPU, what a new program can have without others being swapped out."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    bounds = [_meminfo(), _cgroup()]
    return int(min(bound for bound in bounds if bound is not None))


def _meminfo() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup() -> int | None:
    """What is left to a container that has a bound; None if there is none."""
    here = Path("/sys/fs/cgroup")
    try:
        bound, taken = ((here / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return None if bound == "max" else max(0, int(bound) - int(taken))
    except OSError:
        return None


def _divisors(number: int) -> list[int]:
    """All divisors, the largest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)}, reverse=True)
