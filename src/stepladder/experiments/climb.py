"""Climb a ladder: every (rung, seed) as a process of its own, several at a time, resumable, none left behind."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import stepladder.eval  # noqa: F401  (registers the suites)
from stepladder.core.errors import UserError
from stepladder.core.files import read_json, write_json
from stepladder.data.sources import TaskSource
from stepladder.eval.suite import check, decisive, selected
from stepladder.experiments.ladder import Ladder, Rung
from stepladder.experiments.race import race
from stepladder.run import EvalConfig, Run, TrainConfig
from stepladder.train import session
from stepladder.train.request import differences

GRACE = 60.0
"""Seconds that interrupted runs have to write their checkpoints."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_INTERRUPTED = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT}
_USER_ERROR = 2
_ENDS = {"complete"}
_CHECKED = {"self_test": {"complete", "passed", "failed"}}  # suites with an outcome of their own


class Failed(SystemExit):
    """The ladder was climbed and its page written, but some runs have no result; left alone, it ends the process."""


@dataclass(frozen=True)
class Job:
    """One run of a ladder: which rung and seed, the frozen run itself, and files whose locks last as long as it."""

    rung: str
    run: Run
    locks: tuple[int, ...] = ()


def climb(
    ladder: Ladder,
    rungs: dict[str, Rung],
    root: Path,
    *,
    jobs: int | None = None,
    plugins: tuple[str, ...] = (),
    command: str = "",
    say: Callable[[str], None] = print,
) -> tuple[Path, list[str]]:
    """Train and evaluate every run of the ladder under ``root/<ladder name>``; returns it and the runs that failed.

    Runs that are complete are left as they are, interrupted ones go on from their last checkpoint. A run that
    fails is recorded with the end of its log and counts against its rung; one that the user has to mend something
    for stays without a result; the others go on. A folder that holds runs of another ladder, or is being climbed, is
    refused. ``jobs``: runs at a time; by default one for each GPU, or without any, cores / threads. When no run is
    left, the rungs are timed side by side. ``command`` is what the page says how to do it again.
    """
    home = root / ladder.name
    todo = [Job(name, planned(rung, name, seed)) for seed in ladder.seeds for name, rung in rungs.items()]
    check(rungs[ladder.control].run)  # what evaluation would fail on shows before there is a folder
    with _locked(home):
        _same_ladder(home, [job.run for job in todo])
        write_json(home / "ladder.json", {**describe(ladder, rungs), "command": command})
        waiting = [job for job in todo if not finished(home / job.run.name, job.run)]
        if len(waiting) < len(todo):
            say(f"{len(todo) - len(waiting)} of {len(todo)} runs are already done")
        gpus = visible_gpus(todo[0].run.train)
        width = jobs or len(gpus) or max(1, (os.cpu_count() or 1) // (todo[0].run.train.threads or 1))
        failed = work(waiting, len(waiting), home, width, gpus, plugins, say)
        _time(ladder, rungs, home, plugins, say)
        return home, failed


def visible_gpus(train: TrainConfig) -> list[str]:
    """The GPUs to train on, as CUDA names them in this process; none on a CPU."""
    if session.pick_device(train).type == "cpu":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def _time(
    ladder: Ladder, rungs: dict[str, Rung], home: Path, plugins: tuple[str, ...], say: Callable[[str], None]
) -> None:
    """Race the rungs that have a trained run, unless that was done: timing.json."""
    configs = {
        name: home / "configs" / f"{planned(rung, name, ladder.seeds[0]).name}.json" for name, rung in rungs.items()
    }
    configs = {name: config for name, config in configs.items() if config.is_file()}
    place = home / "timing.json"
    if not ladder.timing or len(configs) < 2 or (place.is_file() and set(read_json(place)["seconds"]) >= set(configs)):
        return
    say(f"timing {len(configs)} rungs side by side, {ladder.timing} rounds")
    found = race(ladder.control, configs, home / "logs", ladder.timing, plugins)
    for name, reason in found["errors"].items():
        say(f"{name} has no time: {reason}")
    write_json(place, found)


def planned(rung: Rung, name: str, seed: int) -> Run:
    """The run of a rung and a seed."""
    return rung.run.model_copy(update={"name": f"{name}-s{seed}", "seed": seed, "start": rung.starts.get(seed)})


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Create the ladder's folder and hold it for this process; the lock dies with its holder, however that ends."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{home} is being climbed by another process; wait for it, or give another name") from None
        yield


def _same_ladder(home: Path, runs: list[Run]) -> None:
    """A folder holds the runs of one ladder: nothing of another is overwritten, or taken for this one's."""
    for run in runs:
        config = home / run.name / "config.json"
        if not config.is_file():
            continue
        there = Run.of(read_json(config), str(config))
        if there.hash() != run.hash():
            raise UserError(
                f"{home} holds another climb of this ladder ({run.name}: {differences(there, run)}); "
                f"give this one another name: name={home.name}2, or move that folder"
            )


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
        "hashes": {
            name: {str(seed): planned(rung, name, seed).hash() for seed in ladder.seeds} for name, rung in rungs.items()
        },
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
    return done and all(
        _evaluated(home / f"results_{suite}.json", suite, run.eval) for suite in selected(run.eval.suites)
    )


def _evaluated(results: Path, suite: str, asked: EvalConfig) -> bool:
    """Whether a suite came to its end, of what is asked for: more samples or a temperature are another one."""
    found = read_json(results) if results.is_file() else {}
    meta = found.get("meta", {})
    same = all(meta.get(field, value) == value for field, value in decisive(asked).items())
    return same and found.get("status") in _CHECKED.get(suite, _ENDS)


def work(
    jobs: Iterable[Job],
    total: int,
    home: Path,
    width: int,
    gpus: list[str],
    plugins: tuple[str, ...],
    say: Callable[[str], None],
    ended: Callable[[Job], object] = id,
) -> list[str]:
    """Run the jobs, ``width`` at a time and each on the GPU with the fewest; returns the names of those that failed.

    jobs: asked for the next one only when it can start, so what comes may depend on what has ended; ``total``, of which
    the lines speak, is how many there will be. ended: called with every job whose process has, however it did.
    """
    running: dict[subprocess.Popen[bytes], tuple[Job, float, str | None]] = {}
    queue, failed = iter(jobs), []
    done, more = 0, True
    with _signals() as received:
        try:
            while (more or running) and not received:
                while more and len(running) < width and not received:
                    job = next(queue, None)
                    if job is None:
                        more = False
                        break
                    busy = [gpu for *_, gpu in running.values()]
                    gpu = min(gpus, key=busy.count, default=None)
                    running[_start(job, home, gpu, plugins)] = (job, time.monotonic(), gpu)
                for process in [p for p in running if p.poll() is not None]:
                    job, began, _ = running.pop(process)
                    done += 1
                    took = time.monotonic() - began
                    text = _outcome(process.returncode, home, job)
                    say(f"[{done}/{total}] {job.run.name}: {text} ({took:.0f} s)")
                    if process.returncode:
                        failed.append(job.run.name)
                    ended(job)
                time.sleep(0.1)
        finally:
            _stop(list(running), received)
        if received and (more or running):
            say("interrupted; the same command goes on from the checkpoints")
            raise SystemExit(128 + received[0])
    return failed


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals to stop that arrive meanwhile, in a list that grows: nothing is torn out of what it is doing."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield received
        return
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(running: list[subprocess.Popen[bytes]], received: list[int]) -> None:
    """Ask every child once to stop and wait for its checkpoint; another signal, or the end of patience, kills."""
    already = len(received)
    for process in running:
        process.send_signal(signal.SIGTERM)
    patience = time.monotonic() + GRACE
    while any(p.poll() is None for p in running) and time.monotonic() < patience and len(received) == already:
        time.sleep(0.05)
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()


def _start(job: Job, home: Path, gpu: str | None, plugins: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """A child that trains and evaluates one run; what it prints goes to logs/<run>.log."""
    config = home / "configs" / f"{job.run.name}.json"
    write_json(config, job.run.tree())
    place = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    log = home / "logs" / f"{job.run.name}.log"
    log.parent.mkdir(exist_ok=True)
    threads = str(job.run.train.threads or os.cpu_count() or 1)
    flags = [flag for plugin in plugins for flag in ("--plugin", plugin)]
    command = [sys.executable, "-m", "stepladder.cli", "train", str(config), "--runs", str(home), "--quiet", *flags]
    with log.open("ab") as sink:
        return subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **place, "OMP_NUM_THREADS": threads},
            start_new_session=True,  # the terminal's SIGINT comes to us alone; we tell the children, once
            pass_fds=job.locks,
        )


def _outcome(code: int, home: Path, job: Job) -> str:
    path = home / job.run.name / "summary.json"
    if code == 0:
        summary = read_json(path)
        loss = summary["final_loss"]
        return f"{summary['status']}, loss {'none' if loss is None else format(loss, '.3f')}"
    lines = (home / "logs" / f"{job.run.name}.log").read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no output"
    if code in _INTERRUPTED:
        return "interrupted; the same command goes on from its checkpoint"
    if code == _USER_ERROR:  # for the user to mend, and no result of the run
        return f"not run: {last}"
    reason = f"exit status {code}: {last}"
    if not path.is_file():  # it died without a word
        write_json(path, {"status": "crashed", "reason": reason, "hash": job.run.hash()})
    return f"failed with {reason}"
