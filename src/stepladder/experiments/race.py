"""Training times side by side: every rung in a process of its own, a few steps each in turn, round after round.

Seconds that runs note for themselves were measured at different times, beside whatever else the machine did. Here
all rungs stand ready at once, built, compiled and warmed up, and only the one whose turn it is works. So a slow
moment of the machine falls on neighbours of one round, and ratios are taken within rounds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepladder import plugins as plugin_files
from stepladder.core.errors import UserError
from stepladder.core.files import read_json
from stepladder.core.keys import key
from stepladder.data.stream import Stream
from stepladder.run import Run, cache_folder
from stepladder.train import session
from stepladder.train.optim import optimizer as make_optimizer
from stepladder.train.provenance import device_name
from stepladder.train.starting import base_of, set_out
from stepladder.train.step import gradient_step

WARM_UP = 3
"""Steps before the first turn: compilation, allocation, the optimizer's moments."""
TURN = 0.5
"""Seconds that the control's turn lasts at least; all rungs take as many steps as it."""


def race(
    control: str, configs: dict[str, Path], logs: Path, rounds: int, plugins: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Seconds of training per rung and round: timing.json, plain data.

    configs: the run file of every rung; logs: a folder for what racers say. Gives device; rounds; steps of a turn;
    tokens of the control's step; seconds by rung: one number a round, for that many tokens; errors by rung: the last
    words of those that did not start or stopped, which have no seconds. No racer is left when it returns.
    """
    racers = {rung: Racer(config, logs / f"race-{rung}.log", plugins) for rung, config in configs.items()}
    try:
        ready = {rung: found for rung, racer in racers.items() if (found := racer.hear())}
        seconds: dict[str, list[float]] = {rung: [] for rung in ready}
        steps = 1
        while control in seconds and (racers[control].turn(steps) or TURN) < TURN:
            steps *= 2
        for number in range(rounds if control in seconds else 0):
            first = number % len(ready)
            for rung in [*ready][first:] + [*ready][:first]:
                if rung in seconds and (took := racers[rung].turn(steps)) is not None:
                    share = ready[control]["tokens"] / ready[rung]["tokens"]
                    seconds[rung].append(took / steps * share)
                else:
                    seconds.pop(rung, None)
        return {
            "device": next((about["device"] for about in ready.values()), None),
            "rounds": rounds,
            "steps": steps,
            "tokens": ready[control]["tokens"] if control in ready else None,
            "seconds": seconds,
            "errors": {rung: racer.last_words() for rung, racer in racers.items() if rung not in seconds},
        }
    finally:
        for racer in racers.values():
            racer.end()


class Racer:
    """A process that stands ready to take training steps of one run."""

    def __init__(self, config: Path, log: Path, plugins: tuple[str, ...]) -> None:
        self.log = log
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stepladder.experiments.race", str(config), *plugins],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                start_new_session=True,  # an interrupt comes to us, and we end it
            )

    def turn(self, steps: int) -> float | None:
        """Seconds that it takes for so many steps; None if it is no more."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except OSError:
            return None
        found = self.hear()
        return None if found is None else float(found["seconds"])

    def hear(self) -> dict[str, Any] | None:
        """What it says next; None if it is no more."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries may print, too
                found: dict[str, Any] = json.loads(line)
                return found
        return None

    def last_words(self) -> str:
        """Why it is no more."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self.process.wait()}"

    def end(self) -> None:
        """End it; it holds nothing worth keeping."""
        self.process.kill()
        self.process.communicate()


def stand_ready(config: Path) -> None:
    """A racer: get ready, then for every number on stdin take that many training steps and print the seconds."""
    run = Run.of(read_json(config), str(config))
    device = session.pick_device(run.train)
    with session.torch_settings(run.train, device):
        base = base_of(run)
        stream = Stream(run.data, run.seed, cache_folder(), base.tokenizer if base else None)
        model = session.build(run, stream.tokenizer.vocab)
        set_out(model, run, base)
        model.to(device)
        stream.expand(session.body(model))
        optimizer = make_optimizer(model, run.train)
        if run.train.compile:
            model.compile()
        rows = np.arange(run.train.batch)
        batches = [stream.batch(step, rows, run.train.batch) for step in range(WARM_UP)]

        def take(steps: int) -> float:
            began = time.perf_counter()
            for step in range(steps):
                noise = key(run.seed, "noise", step).seed()
                gradient_step(model, optimizer, batches[step % WARM_UP], run.train, lr=1e-6, noise=noise)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - began

        take(WARM_UP)
        print(json.dumps({"device": device_name(device), "tokens": batches[0].tokens.size}), flush=True)
        for line in sys.stdin:
            print(json.dumps({"seconds": take(int(line))}), flush=True)


if __name__ == "__main__":
    plugin_files.load(sys.argv[2:])
    try:
        stand_ready(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"error: {error}")
