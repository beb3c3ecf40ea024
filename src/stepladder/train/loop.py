"""The training loop: one screen, no callbacks; everything it depends on is a function of (run, step)."""

from __future__ import annotations

import dataclasses
import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepladder.core.errors import UserError
from stepladder.core.keys import key
from stepladder.data.stream import Stream
from stepladder.models.lm import LanguageModel
from stepladder.run import Run, TrainConfig
from stepladder.train import checkpoint
from stepladder.train.micro import Micro
from stepladder.train.optim import learning_rate, never_updated
from stepladder.train.step import HALTING, OutOfMemory, Taken, gradient_step

FLAGGED = 5.0
"""A loss above this multiple of its running mean is reported as a spike, skipped or not."""
MEMORY = 50
"""Updates that the running mean of the loss looks back on."""
SETTLED = 20
"""Updates before a loss can be called a spike."""

SAVES = 10
"""Checkpoints in a budget of steps, unless ``save_every`` says otherwise."""


@dataclass
class Stop:
    """Set by a signal handler: the number of the signal that asks the loop to stop after the step at hand."""

    signal: int = 0


@dataclass(frozen=True)
class Budget:
    """When to stop, and what the schedule counts as its whole: steps if they are known up front, else seconds.

    steps, seconds: one of the two. horizon: in the same unit, where the schedule ends; smaller in an extended run,
    which goes on at the final rate. flops_per_token: of training (3 x forward).
    """

    steps: int | None
    seconds: float | None
    horizon: float
    flops_per_token: float

    @staticmethod
    def of(train: TrainConfig, tokens_per_step: int, flops_per_token: float) -> Budget:
        """The budget of a run: tokens and FLOPs become the nearest number of steps, at least one."""
        if train.seconds is not None:
            return Budget(None, train.seconds, train.seconds, flops_per_token)
        steps = train.steps
        if steps is None:
            tokens = train.tokens if train.tokens is not None else train.flops / flops_per_token  # type: ignore[operator]
            steps = max(1, round(tokens / tokens_per_step))
        return Budget(steps, None, steps, flops_per_token)

    def spent(self, progress: Progress) -> bool:
        """Whether training is over."""
        return progress.step >= self.steps if self.steps is not None else progress.seconds >= (self.seconds or 0)

    def fraction(self, progress: Progress) -> float:
        """Where in the schedule the next step's update stands: 1 at the last step."""
        done = progress.step + 1 if self.steps is not None else progress.seconds
        return min(1.0, done / self.horizon)


@dataclass
class Progress:
    """Where a training stands: beside weights and optimizer, all it takes to go on. Plain data, in state.json.

    step counts batches, updates those that changed the weights; tokens, supervised, flops and seconds (of steps only,
    not of evaluation or saving) sum over all steps; mean is the running mean of the loss. window holds sums since the
    last metric line, so that a resumed run writes the very same lines.
    """

    step: int = 0
    updates: int = 0
    skips_in_row: int = 0
    tokens: int = 0
    supervised: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    evaluated: int = 0
    mean: float | None = None
    loss: float | None = None
    window: dict[str, float] = field(default_factory=dict)
    window_supervised: int = 0
    window_tokens: int = 0
    window_seconds: float = 0.0

    def count(self, taken: Taken, tokens: int, flops_per_token: float, seconds: float) -> None:
        """Add one step."""
        self.step += 1
        self.tokens += tokens
        self.supervised += taken.supervised
        self.flops += flops_per_token * tokens
        self.seconds += seconds
        self.window_tokens += tokens
        self.window_seconds += seconds
        if taken.refused:
            self.skips_in_row += 1
            return
        self.skips_in_row = 0
        self.updates += 1
        share = max(1 / self.updates, 1 / MEMORY)
        self.mean = taken.loss if self.mean is None else (1 - share) * self.mean + share * taken.loss
        self.window_supervised += taken.supervised
        for name, value in {**taken.sums, **taken.halting}.items():
            self.window[name] = self.window.get(name, 0.0) + value

    def close_window(self, lr: float, grad_norm: float, grad_norms: dict[str, float] | None = None) -> dict[str, Any]:
        """The metric line for the steps since the last one. Losses are means over supervised tokens of updates.

        Norms are the last step's, before clipping, None where they are not finite; ``grad_norms`` are those of parts,
        and the line has none for a model without such parts; nor has it figures of halting (see step.HALTING) for a
        model that does not decide its ticks.
        """
        means = {name: value / self.window_supervised for name, value in self.window.items()}
        self.loss = means.pop("nll", None)
        halting = {name: means.pop(name) for name in HALTING if name in means}
        line = {
            **{name: getattr(self, name) for name in ("step", "tokens", "supervised", "loss")},
            "lr": lr,
            "grad_norm": _finite(grad_norm),
            **({"grad_norms": {name: _finite(norm) for name, norm in grad_norms.items()}} if grad_norms else {}),
            "seconds": round(self.seconds, 3),
            "tokens_per_s": round(self.window_tokens / max(self.window_seconds, 1e-9), 1),
            "flops": self.flops,
            "losses": means,
            **halting,
            "event": None,
        }
        self.window, self.window_supervised, self.window_tokens, self.window_seconds = {}, 0, 0, 0.0
        return line


def fit(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    stream: Stream,
    run: Run,
    budget: Budget,
    progress: Progress,
    run_dir: Path,
    stop: Stop,
    *,
    micro: Micro | None = None,
    evaluate: Callable[[], dict[str, Any]] | None,
    log: Callable[[dict[str, Any]], None],
) -> str:
    """Train from where ``progress`` stands until the budget is spent; "complete", "interrupted" or "diverged".

    ``evaluate`` gives figures of the model as it is, ``log`` keeps a metric line. Ends with a checkpoint in any case.
    ``micro``: how many rows at a time; default: as ``run.train`` says.
    """
    micro = micro or Micro(run.train, [])
    train, rows, saved = run.train, np.arange(run.train.batch), progress.step or -1
    save = partial(_save, run_dir, model, optimizer, progress, run)
    save_every = train.save_every or (math.ceil(budget.steps / SAVES) if budget.steps else None)
    while True:
        spent, diverged = budget.spent(progress), progress.skips_in_row > train.max_skips
        over = spent or diverged
        # Before the evaluation, which may fail.
        if saved < progress.step and (over or _due(progress.step, save_every)) and save(last=over):
            saved = progress.step
        due = over or _due(progress.step, train.eval_every)
        if evaluate and due and progress.evaluated < progress.step and not stop.signal:
            log({"step": progress.step, "eval": evaluate()})
            progress.evaluated = progress.step
        if stop.signal or over:
            if saved < progress.step:
                save(last=True)
            return "interrupted" if stop.signal else "diverged" if diverged else "complete"

        began = time.perf_counter()
        lr = learning_rate(train, budget.fraction(progress))
        noise = key(run.seed, "noise", progress.step).seed()
        batch = stream.batch(progress.step, rows, train.batch)
        limit = _spike(progress, train.spike)
        take = partial(gradient_step, model, optimizer, batch, lr=lr, noise=noise, limit=limit)
        while (taken := _tried(take, micro, progress.step, log)) is None:
            pass
        usual = _spike(progress, FLAGGED)
        progress.count(taken, batch.tokens.size, budget.flops_per_token, time.perf_counter() - began)

        for event in _events(taken, progress, usual, model, optimizer):
            log(event)
        if _due(progress.step, train.log_every) or budget.spent(progress):
            log(progress.close_window(lr, taken.grad_norm, taken.grad_norms))


def _tried(
    take: Callable[[TrainConfig], Taken], micro: Micro, step: int, log: Callable[[dict[str, Any]], None]
) -> Taken | None:
    """The step; or None if it ran out of memory, and takes fewer rows at a time when it is tried again."""
    try:
        return take(micro.at(step))
    except OutOfMemory as error:
        cause = str(error)  # and not the error itself, which holds on to all that the step had made
    gc.collect()
    torch.cuda.empty_cache()
    log(micro.shrink(step, cause))
    return None


def _finite(norm: float) -> float | None:
    """The norm as JSON can say it."""
    return norm if math.isfinite(norm) else None


def _due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0


def _spike(progress: Progress, multiple: float | None) -> float:
    """The loss above which a step is a spike; infinite while nothing is known yet."""
    if multiple is None or progress.mean is None or progress.updates < SETTLED:
        return math.inf
    return multiple * progress.mean


def _events(
    taken: Taken, progress: Progress, usual: float, model: LanguageModel, optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """Metric lines about what was unusual in a step."""
    found: list[dict[str, Any]] = []
    if taken.refused:
        details = {"rows": taken.rows, "parameters": taken.parameters}
        found.append({"step": progress.step, "event": "skipped", "cause": taken.refused, **details})
    elif taken.loss > usual:
        found.append({"step": progress.step, "event": "spike", "observed": taken.loss, "flagged_above": usual})
    if progress.updates == 2 and not taken.refused and (idle := never_updated(model, optimizer)):
        found.append({"step": progress.step, "event": "no_gradient", "parameters": idle})
    return found


def _save(
    run_dir: Path,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    run: Run,
    *,
    last: bool,
) -> bool:
    """Save a checkpoint. A disk that is full in mid-run may have room at the next save: then say so and go on."""
    try:
        state = {"run": run.hash(), "progress": dataclasses.asdict(progress)}
        checkpoint.save(run_dir, progress.step, model, optimizer, state, run.train.keep)
    except OSError as error:
        problem = f"the checkpoint of step {progress.step} could not be written ({error}); earlier ones are intact"
        if last:
            raise UserError(f"{problem}; make room, then give the same command again to go on from there") from error
        print(f"stepladder: warning: {problem}; training goes on", file=sys.stderr)
        return False
    return True
