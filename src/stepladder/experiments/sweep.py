"""A sweep: one run, the paths in it that are varied, and the figure that says which point is best."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Tag, model_validator

import stepladder.eval  # noqa: F401  (registers the suites, whose figures are objectives)
from stepladder.core.config import Config, Field, canonical, override, points, read_tree, validate
from stepladder.core.errors import UserError
from stepladder.core.files import read_json, read_lines, safe_name
from stepladder.core.keys import key
from stepladder.core.registry import did_you_mean
from stepladder.core.trees import parse_yaml
from stepladder.data.stream import Stream
from stepladder.eval import suite
from stepladder.experiments.climb import finished
from stepladder.report.sweep import told
from stepladder.run import Run, TrainConfig
from stepladder.train import session

MOST_CORNERS = 256
"""Corners of a search space that are tried before a search; of a space that has more, so many drawn ones."""

_LOSS = "final_loss"
_VARIED = ("model", "encoder", "data", "train")


class Range(Config):
    """Numbers from ``low`` to ``high``, both included."""

    low: float = Field(description="smallest value")
    high: float = Field(description="largest value")
    log: bool = Field(False, description="as likely in every factor as in any other; else in every interval")
    whole: bool = Field(False, description="integers")

    @model_validator(mode="after")
    def _check(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low:g} has no logarithm; give one above 0, or leave log out")
        if self.whole and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"low={self.low:g} and high={self.high:g} of a range of integers must be integers")
        return self

    def ends(self) -> list[int | float]:
        """The smallest and the largest value, as a run takes them."""
        return [int(end) if self.whole else end for end in (self.low, self.high)]

    def at(self, unit: float) -> int | float:
        """The value at ``unit`` in [0, 1) of the range."""
        low, high = (self.low - 0.5, self.high + 0.5) if self.whole else (self.low, self.high)
        value = math.exp(math.log(low) + unit * math.log(high / low)) if self.log else low + unit * (high - low)
        return int(min(max(round(value), self.low), self.high)) if self.whole else min(max(value, self.low), self.high)


# Told apart by what is written, so that a flawed range is not also said to be no list.
_Choices = Annotated[
    Annotated[list[Any], Tag("list")] | Annotated[Range, Tag("range")],
    Discriminator(lambda given: "range" if isinstance(given, dict | Range) else "list"),
]


class Sweep(Config):
    """The file that says what is searched. ``run`` is what all points share; a point is what it changes in that."""

    name: str = Field(description="directory of the sweep under runs/")
    method: Literal["grid", "random", "tpe"] = Field(
        "grid", description="grid: every combination; random: draws; tpe: draws that learn (pip install optuna)"
    )
    metric: str = Field(
        description="figure of a run's last validation, such as bits_per_byte/pydoc; of several, as bits_per_byte, the "
        "mean; or final_loss, of training"
    )
    goal: Literal["minimise", "maximise"] = Field(description="what is best")
    space: dict[str, _Choices] = Field(
        min_length=1, description="path in the run -> list of values, or {low, high, log, whole}"
    )
    points: int | None = Field(None, ge=1, description="points of random and tpe; a grid has its own number")
    seed: int = Field(0, ge=0, description="of the draws")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="runs of every point; their mean is the objective")
    invalid: Literal["refuse", "skip"] = Field("refuse", description="what to do where a point is no valid run")
    run: dict[str, Any] = Field(description="what all points share: model, data, train, eval")

    @model_validator(mode="after")
    def _check(self) -> Sweep:
        safe_name(self.name)
        if there := {"name", "seed"} & self.run.keys():
            raise UserError(f"run: '{min(there)}' is not shared: points have names and seeds of their own; see seeds")
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError("a seed is listed twice; every seed is one independent run")
        if (self.method == "grid") != (self.points is None):
            how = "a grid has as many as it has combinations; leave it out" if self.points else "say how many to draw"
            raise UserError(f"points: {how} (method: {self.method})")
        for path, values in self.space.items():
            if path.partition(".")[0] not in _VARIED:
                raise UserError(f"space: '{path}' cannot be varied; a path begins with {', '.join(_VARIED)}")
            if isinstance(values, Range) and self.method == "grid":
                raise UserError(f"space: '{path}' is a range, and a grid needs a list; or take method random or tpe")
            if isinstance(values, list) and len(set(map(canonical, values))) != max(len(values), 1):
                raise UserError(f"space: '{path}' must have a list of one or more values, each of them once")
        return self


@dataclass(frozen=True)
class Point:
    """Values by path, and the run of every seed. A run is named by its hash: equal runs of two sweeps are one."""

    values: dict[str, Any]
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Plan:
    """A sweep whose points can be made: ``points`` in order (none yet where the search chooses them), and those left
    out, with the reason. ``make`` gives the point of some values, or raises the UserError that says why there is none.
    """

    sweep: Sweep
    make: Callable[[dict[str, Any]], Point]
    train: TrainConfig  # of one point: device and threads
    points: list[Point]
    invalid: list[tuple[dict[str, Any], str]]


def read(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """A sweep file with ``path=value`` overrides; ``space.train.lr=[0.1]`` sets what the path ``train.lr`` may be."""
    varied = [word for word in overrides if re.match(r"space\..+=", word)]
    tree = override(read_tree(path), [word for word in overrides if word not in varied])
    space = tree.setdefault("space", {})
    for place, _, values in (word.removeprefix("space.").partition("=") for word in varied):
        if isinstance(space, dict):  # else the file is refused anyway
            space[place] = parse_yaml(values, f"override 'space.{place}={values}'")
    return validate(Sweep, tree, str(path))


def plan(sweep: Sweep, cache_dir: Path) -> Plan:
    """Make and try every point, or of a TPE search the corners of its space. Nothing is run, no directory is made.

    Tried is: the run's configuration, its data, its model (built without allocating it), what its evaluation would
    refuse; and of one point, whether it has the metric. Points that are no valid run are a UserError, or, as the sweep
    says, left out.
    """
    if sweep.method == "tpe" and find_spec("optuna") is None:
        raise UserError("method tpe needs Optuna: pip install 'stepladder[sweep]'; grid and random do without it")
    make = _maker(sweep, cache_dir)
    found: dict[str, Point] = {}
    invalid: list[tuple[dict[str, Any], str]] = []
    tried: set[str] = set()
    for values in {"grid": _grid, "random": _drawn, "tpe": _corners}[sweep.method](sweep):
        if canonical(values) in tried:
            continue
        tried.add(canonical(values))
        try:
            point = make(values)
        except UserError as error:
            if sweep.invalid == "refuse":
                raise UserError(f"{error} (invalid: skip leaves such points out)") from None
            invalid.append((values, str(error)))
            continue
        twin = found.setdefault(point.runs[0].name, point)
        if twin is not point and sweep.method == "grid":
            raise UserError(
                f"sweep {sweep.name}: {told(twin.values)} and {told(values)} are the same run; leave one out"
            )
        if sweep.method == "random" and len(found) == sweep.points:
            break
    if not found:
        raise UserError(f"sweep {sweep.name}: no point is a valid run: {invalid[0][1]}")
    if sweep.method == "random" and len(found) < (sweep.points or 0):
        raise UserError(
            f"sweep {sweep.name}: there are {len(found)} different points, not {sweep.points}; ask for less"
        )
    example = next(iter(found.values())).runs[0]
    _has_metric(sweep, example, cache_dir)
    if sweep.method == "tpe":
        return Plan(sweep, make, example.train, [], [])
    return Plan(sweep, make, example.train, list(found.values()), invalid)


def _place(sweep: Sweep, values: dict[str, Any]) -> str:
    return f"sweep {sweep.name}, point {told(values)}"


def _maker(sweep: Sweep, cache_dir: Path) -> Callable[[dict[str, Any]], Point]:
    vocabularies: dict[str, int] = {}

    def make(values: dict[str, Any]) -> Point:
        place = _place(sweep, values)
        try:
            tree = points(sweep.run, {path: [value] for path, value in values.items()})[0]
            run = Run.of({**tree, "name": "point", "seed": 0}, place)
            data = canonical(run.tree()["data"])
            if data not in vocabularies:
                vocabularies[data] = Stream(run.data, run.seed, cache_dir).tokenizer.vocab
            with torch.device("meta"):
                run.build(vocabularies[data])
            suite.check(run)
        except UserError as error:
            raise error if str(error).startswith(place) else UserError(f"{place}: {error}") from None
        name = run.hash()[:12]
        runs = (run.model_copy(update={"name": f"{name}-s{seed}", "seed": seed}) for seed in sweep.seeds)
        return Point(values, tuple(runs))

    return make


def _combined(choices: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _grid(sweep: Sweep) -> Iterator[dict[str, Any]]:
    return _combined({path: values for path, values in sweep.space.items() if isinstance(values, list)})


def _corners(sweep: Sweep) -> Iterable[dict[str, Any]]:
    """All combinations of the ends of ranges and the values of lists; of too many, some."""
    ends = {path: values.ends() if isinstance(values, Range) else values for path, values in sweep.space.items()}
    if math.prod(map(len, ends.values())) <= MOST_CORNERS:
        return _combined(ends)
    return itertools.islice(_draws(sweep, dict(ends)), MOST_CORNERS)


def _drawn(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Draws until there are as many different ones as are asked for; in a space without so many they come to an end."""
    return itertools.islice(_draws(sweep, sweep.space), 100 * (sweep.points or 1))


def _draws(sweep: Sweep, space: Mapping[str, list[Any] | Range]) -> Iterator[dict[str, Any]]:
    """Every path has random numbers of its own: another path more or less leaves its draws as they are."""
    for index in itertools.count():
        units = {path: key(sweep.seed, "sweep", path).generator(index).random() for path in space}
        yield {path: at(values, units[path]) for path, values in space.items()}


def at(values: list[Any] | Range, unit: float) -> Any:
    """The value at ``unit`` in [0, 1) of what a path may be."""
    return values.at(unit) if isinstance(values, Range) else values[int(unit * len(values))]


def _has_metric(sweep: Sweep, run: Run, cache_dir: Path) -> None:
    """Evaluate an untrained model on an item or two, as training does, to see that the metric is among the figures."""
    if sweep.metric == _LOSS:
        return
    run = run.model_copy(update={"train": run.train.model_copy(update={"eval_samples": 1})})
    stream = Stream(run.data, run.seed, cache_dir)
    model = session.build(run, stream.tokenizer.vocab)
    figures = suite.quick(model, stream.tokenizer, run)
    if _figure(figures, sweep.metric) is None:
        known = [*figures, *sorted({name.partition("/")[0] for name in figures} - {*figures}), _LOSS]
        raise UserError(
            f"sweep {sweep.name}: its runs have no metric '{sweep.metric}'{did_you_mean(sweep.metric, known)}; "
            f"they have {', '.join(known)}"
        )


def _figure(figures: Mapping[str, float | None], metric: str) -> float | None:
    """A figure by its name, or the mean of those below it; None if there is none, or it is not finite."""
    found = [value for name, value in figures.items() if name == metric or name.startswith(f"{metric}/")]
    finite = [value for value in found if value is not None]
    return fmean(finite) if finite and len(finite) == len(found) else None


# What came of it ----------------------------------------------------------------------------------------------------


def outcome(sweep: Sweep, point: Point, home: Path) -> dict[str, Any]:
    """What is known of a point: status complete, failed, or open (some run has no end yet), and its figures."""
    values, reasons, status = {}, [], "complete"
    for run in point.runs:
        summary = read_json(place) if (place := home / run.name / "summary.json").is_file() else {}
        if not finished(home / run.name, run):
            crashed = summary.get("status") in ("crashed", "failed")
            reasons.append(f"{run.name}: {summary['reason']}" if crashed else f"{run.name} has no end yet")
            status = "failed" if crashed else "open" if status == "complete" else status
            continue
        lines = read_lines(home / run.name / "metrics.jsonl")
        last: dict[str, float | None] = next((line["eval"] for line in reversed(lines) if "eval" in line), {})
        value = summary["final_loss"] if sweep.metric == _LOSS else _figure(last, sweep.metric)
        if summary["status"] == "diverged" or value is None:
            reasons.append(f"{run.name}: {summary['reason'] or f'its {sweep.metric} is not finite'}")
            status = "failed"
        else:
            values[str(run.seed)] = value
    whole = status == "complete"
    return {
        "point": point.values,
        "status": status,
        "reason": "; ".join(reasons) or None,
        "objective": fmean(values.values()) if whole else None,
        "spread": stdev(values.values()) if whole and len(values) > 1 else None,
        "values": values,
        "runs": {str(run.seed): run.name for run in point.runs},
    }


def results(made: Plan, home: Path) -> dict[str, Any]:
    """What is known of a sweep, as plain data: the points from best to worst, then those without an objective."""
    sign = 1 if made.sweep.goal == "minimise" else -1
    found = [outcome(made.sweep, point, home) for point in made.points]
    found.sort(key=lambda entry: (entry["objective"] is None, sign * (entry["objective"] or 0.0)))
    left_out = [
        {"point": values, "status": "invalid", "reason": reason.removeprefix(f"{_place(made.sweep, values)}: ")}
        for values, reason in made.invalid
    ]
    return {
        "sweep": made.sweep.model_dump(mode="json"),
        "best": found[0] if found and found[0]["status"] == "complete" else None,
        "points": found
        + [{**entry, "objective": None, "spread": None, "values": {}, "runs": {}} for entry in left_out],
    }
