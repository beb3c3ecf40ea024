"""A ladder: a control, rungs that differ from it in one factor each, seeds, and what is held equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from stepladder.core.config import Config, Field, leaves, override, points, read_tree, validate
from stepladder.core.errors import UserError
from stepladder.core.files import read_json, safe_name
from stepladder.core.registry import did_you_mean
from stepladder.data.stream import Stream
from stepladder.experiments.match import TOLERANCE, Match, cost, count, match_params
from stepladder.models.adapters import add_adapters
from stepladder.models.base import Cost
from stepladder.models.weights import weights_digest
from stepladder.models.zoo import ARCHITECTURES
from stepladder.run import BOOKKEEPING, Loaded, Run, load
from stepladder.start import Adapters, Start
from stepladder.train.starting import fits

_BOOKKEEPING = {*BOOKKEEPING, "threads", "device", "max_skips"}
"""Fields of train that say how a run is watched and kept, not what it is: no factors."""


class LadderStart(Config):
    """Every (rung, seed) starts from the run of the same rung and seed in a ladder that has been climbed."""

    ladder: str = Field(description="name of that ladder under runs/, or its directory")
    adapters: Adapters | None = Field(None, description="low-rank adapters; default: all weights are trained")


class Ladder(Config):
    """The file that says what is compared. ``run`` is what all rungs share; a rung is what it changes in that."""

    name: str = Field(description="directory of the ladder under runs/")
    control: str = Field(description="the rung that all others are compared with")
    rungs: dict[str, dict[str, Any]] = Field(description="rung name -> overrides of the control, e.g. model.kind")
    floors: tuple[str, ...] = Field((), description="rungs shown for scale; no contenders")
    run: dict[str, Any] = Field(description="the run of the control: model, data, train, eval")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="one run per rung and seed")
    match: Literal["params", "train_flops", "none"] = Field("params", description="what is made equal to the control")
    alpha: float = Field(0.05, gt=0, lt=0.5, description="family-wise error rate of the verdicts")
    margin: float = Field(0.02, gt=0, lt=1, description="differences of accuracy within this count as equivalent")
    timing: int = Field(5, ge=0, description="rounds of the side-by-side timing at the end; 0 = none")
    margin_bits: float = Field(0.02, gt=0, description="the same for bits per byte")
    start: LadderStart | None = Field(None, description="a climbed ladder to start from; default: fresh weights")

    @model_validator(mode="after")
    def _check(self) -> Ladder:
        for rung in (self.name, *self.rungs):
            safe_name(rung)
        for rung in (self.control, *self.floors):
            if rung not in self.rungs:
                hint = did_you_mean(rung, self.rungs) or f"; there are: {', '.join(self.rungs) or 'none'}"
                raise UserError(f"'{rung}' is not among the rungs{hint}")
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError("a seed is listed twice; every seed is one independent run")
        return self


@dataclass(frozen=True)
class Rung:
    """One architecture as configured in the ladder: its run (seed and start still to be set), factor, and match.

    starts: what the run of each seed starts from, if the ladder starts from another.
    """

    name: str
    factor: str
    run: Run
    cost: Cost
    params: int
    residual: float
    matched: bool
    train_flops: float
    starts: Mapping[int, Start] = field(default_factory=dict)


def read(path: Path, overrides: list[str], text: str | None = None) -> Ladder:
    """A ladder file with ``path=value`` overrides; ``text`` replaces the corpus of every text source."""
    ladder = validate(Ladder, override(read_tree(path), overrides), str(path))
    if text is None:
        return ladder
    data = ladder.run.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    places = [i for i, source in enumerate(sources) if _is_text(source)] if isinstance(sources, list | tuple) else []
    if not places:
        raise UserError(f"{path}: there is no text source to replace with '{text}'; add {{kind: text, path: ...}}")
    tree = ladder.model_dump(mode="json")
    tree["run"] = points(tree["run"], {f"data.sources.{i}.path": [text] for i in places})[0]
    return validate(Ladder, tree, str(path))


def _is_text(source: Any) -> bool:
    return source == "text" or (isinstance(source, dict) and source.get("kind") in ("text", "corpus"))


def expand(ladder: Ladder, cache: Path, runs: Path = Path("runs")) -> dict[str, Rung]:
    """Every rung, validated, held to one factor, and matched to the control. Nothing is run, no weight allocated.

    runs: where a ladder that this one starts from has been climbed; its models are loaded.
    """
    control = Run.of({**ladder.run, "name": "run", "seed": 0}, f"ladder {ladder.name}, under 'run'")
    bases = {name: _bases(ladder, name, runs) for name in ladder.rungs}
    vocab = _vocab(control, bases[ladder.control], cache)
    context = control.data.sequence
    target = count(control.model, vocab)
    budget = _flops(control, cost(control.model, vocab, context))
    rungs = {}
    known: dict[str, str] = {}
    for name in sorted(ladder.rungs, key=lambda rung: rung != ladder.control):
        changes = _changes(ladder.rungs[name], name)
        run = _rung(ladder, control, name, changes)
        factor = _factor(control, run, changes, name, is_control=name == ladder.control)
        ids = vocab if run.data == control.data else _vocab(run, bases[name], cache)
        own = count(run.model, ids)
        found = Match(run.model, own, (own - target) / target)
        if ladder.match == "params":
            fixed = tuple(path.split(".")[1] for path in changes if path.startswith("model."))
            found = match_params(run.model, target, ids, fixed)
            run = run.model_copy(update={"model": found.spec})
        price = cost(run.model, ids, run.data.sequence)
        residual = found.residual
        if ladder.match == "train_flops":
            run = _same_flops(run, price, budget)
            residual = (_flops(run, price) - budget) / budget
        twin = known.setdefault(run.hash(), name)
        if twin != name:
            raise UserError(f"the rungs '{twin}' and '{name}' are the same run; leave one of them out")
        starts = {seed: _start(ladder, name, run, base) for seed, base in bases[name].items()}
        close = _close(residual, ladder.match)
        rungs[name] = Rung(name, factor, run, price, found.params, residual, close, _flops(run, price), starts)
    return rungs


def _vocab(run: Run, bases: dict[int, Loaded], cache: Path) -> int:
    """The token ids of a run: those of what it starts from, if it does."""
    own = next((base.tokenizer for base in bases.values()), None)
    return Stream(run.data, run.seed, cache, own).tokenizer.vocab


def _bases(ladder: Ladder, rung: str, runs: Path) -> dict[int, Loaded]:
    """By seed, the trained runs that a rung's start from; none if the ladder starts afresh."""
    if ladder.start is None:
        return {}
    named = ladder.start.ladder
    home = next((home for home in (runs / named, Path(named)) if (home / "ladder.json").is_file()), None)
    if home is None:
        raise UserError(
            f"ladder {ladder.name} starts from '{named}', and {runs / named} is no ladder; climb that first"
        )
    there, found = read_json(home / "ladder.json"), {}
    for seed in ladder.seeds:
        place = there["runs"].get(rung, {}).get(str(seed))
        if place is None:
            raise UserError(
                f"ladder {ladder.name} starts from '{named}', which has no rung '{rung}' with seed {seed}; climb that "
                "with it first, or leave it out here"
            )
        summary = read_json(home / place / "summary.json") if (home / place / "summary.json").is_file() else {}
        if summary.get("status") != "complete" or summary.get("hash") != there["hashes"][rung][str(seed)]:
            raise UserError(
                f"ladder {ladder.name} starts from '{named}', where {place} has not been trained to its end (status: "
                f"{summary.get('status', 'none')}); climb that first"
            )
        found[seed] = load(home / place, device="cpu")
    return found


def _start(ladder: Ladder, name: str, run: Run, base: Loaded) -> Start:
    """What a rung's run starts from, once it is sure that it can."""
    assert ladder.start is not None
    if base.run.model != run.model:
        ours, theirs = leaves(run.model.model_dump(mode="json")), leaves(base.run.model.model_dump(mode="json"))
        path = next(path for path in {**ours, **theirs} if ours.get(path) != theirs.get(path))
        raise UserError(
            f"rung '{name}' has model.{path} = {ours.get(path)}, and in the ladder '{ladder.start.ladder}', which it "
            f"starts from, {theirs.get(path)}; give the same model and match here, or climb that one anew with these"
        )
    place, adapters = base.path.parent.parent, ladder.start.adapters
    fits(run, base, place)
    start = Start(run=str(place), weights=weights_digest(base.model), adapters=adapters)
    if adapters is not None:
        try:
            add_adapters(base.model, adapters.rank, adapters.scale)  # which nobody needs any more
        except UserError as error:
            raise UserError(f"rung '{name}': {error}") from None
    return start


def _close(residual: float, match: str) -> bool:
    return match == "none" or abs(residual) <= TOLERANCE


def _flops(run: Run, price: Cost) -> float:
    """Training FLOPs of a run with a budget in steps, tokens or FLOPs; 0 where the clock decides."""
    per_step = price.train_flops * run.train.batch * run.data.sequence
    if run.train.steps is not None:
        return run.train.steps * per_step
    if run.train.tokens is not None:
        return price.train_flops * run.train.tokens
    return run.train.flops or 0.0


def _same_flops(run: Run, price: Cost, budget: float) -> Run:
    if not budget:
        raise UserError("match: train_flops needs a budget in steps, tokens or flops; a budget in seconds has none")
    steps = max(1, round(budget / (price.train_flops * run.train.batch * run.data.sequence)))
    train = {**run.train.model_dump(), "steps": steps, "tokens": None, "flops": None}
    return Run.of({**run.tree(), "train": train})


def _changes(rung: dict[str, Any], name: str) -> dict[str, Any]:
    """What a rung changes, as path -> value: nodes written as mappings or in short form are taken apart."""
    changes: dict[str, Any] = {}
    for path, value in _flat(rung, ""):
        path = "model.kind" if path == "model" and isinstance(value, str) else path
        top, _, rest = path.partition(".")
        if top not in ("model", "data", "train") or not rest:
            raise UserError(
                f"rung '{name}' changes '{path}'; a factor is a field of model, data or train, such as model.kind"
            )
        if top == "train" and rest.partition(".")[0] in _BOOKKEEPING:
            raise UserError(f"rung '{name}' changes '{path}', which is no factor; put it under 'run', for all rungs")
        if path in changes:
            raise UserError(f"rung '{name}' gives '{path}' twice; leave one of the two out")
        changes[path] = value
    return changes


def _flat(node: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(node, dict) and (node or not path):
        return [leaf for key, value in node.items() for leaf in _flat(value, f"{path}.{key}" if path else str(key))]
    return [(path, node)]


def _rung(ladder: Ladder, control: Run, name: str, changes: dict[str, Any]) -> Run:
    """The control's run with the rung's changes. Another kind of model inherits the control's fields it shares."""
    tree = control.tree()
    where = f"ladder {ladder.name}, rung {name}"
    kind = changes.get("model.kind")
    if isinstance(kind, str):
        fields = ARCHITECTURES.get(kind).model_fields
        given = ladder.run["model"] if isinstance(ladder.run["model"], dict) else {}
        shared = {f: v for f, v in tree["model"].items() if f in fields and f in given and f != "kind"}
        tree["model"] = {**shared, "kind": ARCHITECTURES.name(kind)}
        changes = {path: value for path, value in changes.items() if path != "model.kind"}
    try:
        return Run.of(points(tree, {path: [value] for path, value in changes.items()})[0], where)
    except UserError as error:  # the path of a rung's own, which knows no file
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None


def _factor(control: Run, run: Run, changes: dict[str, Any], name: str, is_control: bool) -> str:
    """The one thing the rung changes; none for the control. Two things are refused: nobody could tell them apart."""
    ours, theirs = leaves(control.tree()), leaves(run.tree())
    differing = [path for path in {**ours, **theirs} if ours.get(path) != theirs.get(path)]
    if "model.kind" in differing:
        # Fields that only one of the two kinds has are part of what that kind is.
        own = set(type(control.model).model_fields) ^ set(type(run.model).model_fields)
        given = {f"model.{field}" for field in control.model.model_fields_set & run.model.model_fields_set}
        differing = [
            p
            for p in differing
            if p == "model.kind"
            or not p.startswith("model.")
            or (p.removeprefix("model.") not in own and (p in given or p in changes))
        ]
    for node in [path.removesuffix("kind") for path in differing if path.endswith(".kind")]:
        # Of any other thing of another kind (a tokenizer, a task), too, what only one of the two has is part of it.
        own = {path for path in differing if path.startswith(node) and (path in ours) != (path in theirs)}
        differing = [path for path in differing if path not in own]
    if is_control:
        if differing:
            raise UserError(f"the control '{name}' changes {', '.join(differing)}; put that under 'run' instead")
        return "control"
    if not differing:
        raise UserError(f"rung '{name}' changes nothing against the control; name its one factor, e.g. model.kind")
    if len(differing) > 1:
        raise UserError(
            f"rung '{name}' changes {len(differing)} factors ({', '.join(sorted(differing))}); "
            "a rung changes one, so make one rung for each"
        )
    path = differing[0]
    return f"{path}: {ours.get(path)} → {theirs.get(path)}"
