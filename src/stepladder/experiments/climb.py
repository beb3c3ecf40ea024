"""Climb a ladder: every (rung, seed) as a process of its own, several at a time, resumable, none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepladder.core.files import read_json, write_json
from stepladder.data.stream import TaskSource
from stepladder.experiments.ladder import Ladder, Rung
from stepladder.run import Run


@dataclass(frozen=True)
class Job:
    """One run of a ladder: which rung and seed, and the frozen run itself."""

    rung: str
    run: Run


def climb(
    ladder: Ladder,
    rungs: dict[str, Rung],
    root: Path,
    *,
    jobs: int | None = None,
    plugins: tuple[str, ...] = (),
    command: str = "",
    say: Callable[[str], None] = print,
) -> Path:
    """Train and evaluate every run of the ladder under ``root/<ladder name>`` and return that directory.

    Runs that are complete are left as they are, interrupted ones go on from their last checkpoint. A run that
    fails is recorded with the end of its log and counts against its rung; the others go on. ``command`` is what the
    page says how to do it again.
    """
    home = root / ladder.name
    home.mkdir(parents=True, exist_ok=True)
    todo = [
        Job(name, rung.run.model_copy(update={"name": f"{name}-s{seed}", "seed": seed}))
        for seed in ladder.seeds
        for name, rung in rungs.items()
    ]
    write_json(home / "ladder.json", {**describe(ladder, rungs), "command": command})
    waiting = [job for job in todo if not finished(home / job.run.name, job.run)]
    if len(waiting) < len(todo):
        say(f"{len(todo) - len(waiting)} of {len(todo)} runs are already done")
    width = jobs or max(1, (os.cpu_count() or 1) // (todo[0].run.train.threads or 1))
    _work(waiting, home, width, plugins, say)
    return home


def describe(ladder: Ladder, rungs: dict[str, Rung]) -> dict[str, Any]:
    """What the report needs to know of a ladder, as plain data: ladder.json."""
    control = rungs[ladder.control].run
    tasks = [source.task.kind for source in control.data.sources if isinstance(source, TaskSource)]
    return {
        "name": ladder.name,
        "control": ladder.control,
        "match": ladder.match,
        "seeds": list(ladder.seeds),
        "tasks": tasks,
        "alpha": ladder.alpha,
        "margin": ladder.margin,
        "margin_bits": ladder.margin_bits,
        "floors": list(ladder.floors),
        "rungs": {
            name: {
                "factor": rung.factor,
                "floor": name in ladder.floors,
                "fields": rung.run.model.model_dump(mode="json"),
                "params": rung.params,
                "flops_per_token": rung.cost.flops,
                "state_bytes": rung.cost.state_bytes,
                "context": rung.run.data.sequence,
                "train_flops": rung.train_flops,
                "residual": rung.residual,
                "matched": rung.matched,
            }
            for name, rung in rungs.items()
        },
        "runs": {name: {str(seed): f"{name}-s{seed}" for seed in ladder.seeds} for name in rungs},
        "ladder": ladder.model_dump(mode="json"),
    }


def finished(home: Path, run: Run) -> bool:
    """Whether a run of this very configuration was trained to its end and evaluated on all its suites."""
    summary = home / "summary.json"
    if not summary.is_file() or read_json(summary).get("hash") != run.hash():
        return False
    if read_json(summary).get("status") == "diverged":
        return True
    done = read_json(summary).get("status") == "complete"
    return done and all((home / f"results_{suite}.json").is_file() for suite in run.eval.suites)


def _work(jobs: list[Job], home: Path, width: int, plugins: tuple[str, ...], say: Callable[[str], None]) -> None:
    running: dict[subprocess.Popen[bytes], tuple[Job, float]] = {}
    queue = list(jobs)
    done = 0
    try:
        while queue or running:
            while queue and len(running) < width:
                job = queue.pop(0)
                running[_start(job, home, plugins)] = (job, time.monotonic())
            for process in [p for p in running if p.poll() is not None]:
                job, began = running.pop(process)
                done += 1
                took = time.monotonic() - began
                say(f"[{done}/{len(jobs)}] {job.run.name}: {_outcome(process.returncode, home, job)} ({took:.0f} s)")
            time.sleep(0.1)
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def _start(job: Job, home: Path, plugins: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """A child that trains and evaluates one run; what it prints goes to logs/<run>.log."""
    config = home / "configs" / f"{job.run.name}.json"
    write_json(config, job.run.tree())
    log = home / "logs" / f"{job.run.name}.log"
    log.parent.mkdir(exist_ok=True)
    threads = str(job.run.train.threads or os.cpu_count() or 1)
    flags = [flag for plugin in plugins for flag in ("--plugin", plugin)]
    command = [sys.executable, "-m", "stepladder.cli", "train", str(config), "--runs", str(home), "--quiet", *flags]
    with log.open("ab") as sink:
        return subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": threads}
        )


def _outcome(code: int, home: Path, job: Job) -> str:
    path = home / job.run.name / "summary.json"
    if code == 0:
        summary = read_json(path)
        loss = summary["final_loss"]
        return f"{summary['status']}, loss {'none' if loss is None else format(loss, '.3f')}"
    lines = (home / "logs" / f"{job.run.name}.log").read_text(errors="replace").strip().splitlines()
    reason = f"exit status {code}: {lines[-1] if lines else 'no output'}"
    if not path.is_file() and code != -signal.SIGTERM:  # it died without a word, and is not just unfinished
        write_json(path, {"status": "crashed", "reason": reason, "hash": job.run.hash()})
    return f"failed with {reason}"
