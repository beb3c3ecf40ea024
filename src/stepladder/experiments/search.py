"""Search sweeps: runs as processes, several at a time; whoever gives the same command again goes on, or joins in.

Several processes may work at one sweep (on one machine, or on a disk where ``flock`` holds between machines). Each
holds the points it works at by a lock on a file under ``claims/``, and so do their runs: it dies with the last of
them, however that ends. What was found is read from the runs' own files, so there is nothing to restore.
"""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from stepladder.core.config import canonical, digest
from stepladder.core.errors import UserError
from stepladder.core.keys import key
from stepladder.experiments.climb import Job, finished, visible_gpus, work
from stepladder.experiments.sweep import Plan, Point, Range, outcome, plan, read, results
from stepladder.experiments.wandb import export
from stepladder.report.sweep import told, write
from stepladder.run import cache_folder

_TWINS = 50
"""Suggestions in a row that were made before, after which a search has seen its space."""

_STARTUP = 5
"""Random points before a search begins to learn."""


def sweeps(
    words: Sequence[str],
    root: Path,
    *,
    jobs: int | None = None,
    plugins: tuple[str, ...] = (),
    wandb: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[tuple[Path, list[str]]]:
    """Sweep files and ``path=value`` overrides for all of them, as they are typed; every file is checked before any
    run. Returns the folder of each, and its runs that failed; with ``wandb``, that file is written and nothing run.
    """
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    if not files:
        raise UserError("name a sweep file, such as sweeps/attention.yaml; overrides come after it")
    plans = [plan(read(Path(file), [word for word in words if word not in files]), cache_folder()) for file in files]
    names = [made.sweep.name for made in plans]
    if len(set(names)) < len(names):
        raise UserError("two of the sweeps have the same name; give them one after the other, each with name=...")
    if wandb is not None:
        if len(plans) > 1:
            raise UserError("a W&B file holds one sweep; export them one at a time")
        if wandb.resolve() == Path(files[0]).resolve():
            raise UserError(f"{wandb} is the sweep itself; give the W&B file another name")
        say(f"written: {wandb}, {export(plans[0], wandb, root)}; to start it: wandb sweep {wandb}")
        return []
    return [search(made, root, jobs=jobs, plugins=plugins, say=say) for made in plans]


def search(
    made: Plan,
    root: Path,
    *,
    jobs: int | None = None,
    plugins: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> tuple[Path, list[str]]:
    """Run a sweep's points under ``root/<its name>``; returns that folder and the runs that failed.

    Runs that are complete are left as they are, interrupted ones go on from their last checkpoints, failed ones are
    tried again, unless they diverged. jobs: runs at a time; by default one for each GPU, or without any, cores /
    threads. results.json, results.md and results.csv are written at the end, also when interrupted.
    """
    home, train = root / made.sweep.name, made.train
    gpus = visible_gpus(train)
    width = jobs or len(gpus) or max(1, (os.cpu_count() or 1) // (train.threads or 1))
    home.mkdir(parents=True, exist_ok=True)
    crew = _Trials(made, home) if made.sweep.method == "tpe" else _Listed(made, home)
    say(f"{made.sweep.name}: {crew.told()}")
    try:
        return home, work(crew.jobs(), crew.left(), home, width, gpus, plugins, say, crew.ended)
    finally:
        crew.close()
        write(home, results(crew.known(), home))


class _Listed:
    """The points of a list, in its order."""

    def __init__(self, made: Plan, home: Path) -> None:
        self.made, self.home = made, home
        self.claims: dict[str, IO[str]] = {}

    def told(self) -> str:
        """One line for whoever waits."""
        skipped = f", {len(self.made.invalid)} left out" if self.made.invalid else ""
        return f"{len(self.made.points)} points{skipped}, {self.left()} runs to go"

    def known(self) -> Plan:
        """The plan, with the points that there are by now."""
        return self.made

    def left(self) -> int:
        """Runs that have no end yet."""
        return sum(len(self._open(point)) for point in self.made.points)

    def jobs(self) -> Iterator[Job]:
        """What is to be run, asked for when there is room for it."""
        for point in self.made.points:
            if self._open(point) and self._claim(point):
                yield from self._open(point)

    def ended(self, job: Job) -> None:
        """A run of this process has ended, somehow."""

    def close(self) -> None:
        """Let go of what this process holds."""
        for file in self.claims.values():
            file.close()

    def _open(self, point: Point) -> list[Job]:
        claim = self.claims.get(point.runs[0].name)
        locks = (claim.fileno(),) if claim else ()
        return [Job(told(point.values), run, locks) for run in point.runs if not finished(self.home / run.name, run)]

    def _claim(self, point: Point) -> bool:
        """Whether this process works at a point from now on; not if another does, or this one has tried already."""
        name = point.runs[0].name
        place = self.home / "claims" / name
        place.parent.mkdir(exist_ok=True)
        file = place.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self.claims[name] = file
        return True


class _Trials(_Listed):
    """The points of a TPE search (Bergstra et al., NeurIPS 2011), kept in Optuna's journal file.

    A trial is finished when its point is, diverged points are failed trials, and one whose runs crashed stays open, for
    the next call of the same command. Another space, run, or goal is another study in the same journal. What is
    suggested depends on the trials before it alone, not on when the search was interrupted.
    """

    def __init__(self, made: Plan, home: Path) -> None:
        super().__init__(made, home)
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, sweep = optuna, made.sweep
        apart = sweep.model_dump(mode="json", exclude={"name", "points", "invalid", "seed"})
        with self._alone():
            self.study = optuna.create_study(
                storage=optuna.storages.JournalStorage(JournalFileBackend(str(home / "journal.log"))),
                study_name=digest(apart)[:16],
                direction="minimize" if sweep.goal == "minimise" else "maximize",
                load_if_exists=True,
            )
        self.numbers: dict[str, int] = {}  # of the trials that this process works at, by the point's first run

    def told(self) -> str:
        there = len(self.known().points)
        return f"{there} of {self.made.sweep.points} points are known, {self.left()} runs to go"

    def known(self) -> Plan:
        points, invalid = [], []
        for trial in self._trials():
            values = self._values(trial)
            if "invalid" in trial.user_attrs:
                invalid.append((values, trial.user_attrs["invalid"]))
            else:
                points.append(self.made.make(values))
        return Plan(self.made.sweep, self.made.make, self.made.train, points, invalid)

    def left(self) -> int:
        known, sweep = self.known(), self.made.sweep
        rest = max(0, (sweep.points or 0) - len(known.points) - len(known.invalid))
        return rest * len(sweep.seeds) + sum(len(self._open(point)) for point in known.points)

    def jobs(self) -> Iterator[Job]:
        while (point := self._next()) is not None:
            yield from self._open(point)
            self._tell(point)  # of which there was nothing to run

    def ended(self, job: Job) -> None:
        for point in self.known().points:
            if job.run in point.runs:
                self._tell(point)

    def _trials(self, *states: Any) -> list[Any]:
        trials = self.study.get_trials(deepcopy=False, states=states or None)
        return [trial for trial in trials if "void" not in trial.user_attrs and len(trial.params) == len(self._space())]

    def _next(self) -> Point | None:
        """A trial that whoever asked for it has left, or a new one; None when there are as many as are wanted."""
        with self._alone():
            for trial in self._trials(self.optuna.trial.TrialState.RUNNING):
                point = self.made.make(self._values(trial))
                if point.runs[0].name not in self.claims and self._claim(point):
                    self.numbers[point.runs[0].name] = trial.number
                    return point
            for _ in range(_TWINS):
                before = {canonical(self._values(trial)) for trial in self._trials()}
                if len(before) >= (self.made.sweep.points or 0):
                    return None
                if (new := self._ask(before)) is not None:
                    return new
        return None

    def _ask(self, before: set[str]) -> Point | None:
        """A new trial, claimed; None if the suggestion is not new, or no valid run."""
        sweep, count = self.made.sweep, len(self.study.get_trials(deepcopy=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
            self.study.sampler = self.optuna.samplers.TPESampler(
                seed=key(sweep.seed, "tpe", count).seed() % 2**32,
                n_startup_trials=_STARTUP,
                constant_liar=True,  # points under way count as bad ones, so that workers do not crowd
            )
        trial = self.study.ask(self._space())
        values = self._values(trial)
        if canonical(values) in before:
            trial.set_user_attr("void", True)
        else:
            try:
                point = self.made.make(values)
                self._claim(point)
                self.numbers[point.runs[0].name] = trial.number
                return point
            except UserError as error:
                trial.set_user_attr("invalid", str(error))
        self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        return None

    def _tell(self, point: Point) -> None:
        """Let the search know, once all runs of a point have ended with a result."""
        name = point.runs[0].name
        if name not in self.numbers or self._open(point):
            return
        number, found = self.numbers.pop(name), outcome(self.made.sweep, point, self.home)
        if found["status"] == "complete":
            self.study.tell(number, found["objective"])
        else:
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)

    def _space(self) -> dict[str, Any]:
        kinds, space = self.optuna.distributions, {}
        for path, values in self.made.sweep.space.items():
            if isinstance(values, Range):
                kind = kinds.IntDistribution if values.whole else kinds.FloatDistribution
                space[path] = kind(*values.ends(), log=values.log)
            else:
                space[path] = kinds.CategoricalDistribution([canonical(value) for value in values])
        return space

    def _values(self, trial: Any) -> dict[str, Any]:
        space = self.made.sweep.space
        return {p: v if isinstance(space[p], Range) else json.loads(v) for p, v in trial.params.items()}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Of the processes that share the journal, one at a time."""
        with (self.home / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
