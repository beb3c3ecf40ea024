"""What the files of a ladder say: every run's outcomes, item by item, verified before they are believed.

Nothing is judged here. Records are re-counted rather than trusted: the hash chain of every line file must
hold, the stated results must be those of the records, and all runs must have answered the very same items.

A run is *complete*; or *failed* (diverged, crashed: it counts, as the worst score there is); or *pending* (not run,
interrupted, not yet evaluated: it says nothing, and until it does nothing is claimed about its rung).
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stepladder.core.errors import UserError
from stepladder.core.files import read_json, read_lines
from stepladder.core.redact import redact
from stepladder.core.registry import did_you_mean
from stepladder.report.timing import Timing
from stepladder.report.timing import read as read_timing

WORST_BITS_PER_BYTE = 8.0  # a uniform guess over the 256 bytes
_FAILURES = {"diverged", "failed", "crashed"}
_MATCHED = ("algorithmic", "vision")  # suites of answers that are right or wrong
_COUNTED = (*_MATCHED, "likelihood")  # suites whose records are re-counted
_DRAWN = ("depth", "self_test")  # suites that are read in their own way, or not shown
_OVERLAPS = {"exact", "normalised", "canonical"}  # the ways in which an evaluation item can occur in training


class Cell(NamedTuple):
    """One square of the evaluation grid."""

    task: str
    size: int
    regime: str  # "iid" or "ood"


@dataclass(frozen=True)
class Text:
    """Likelihood records of one source, in the order of their index: float64 arrays of one length."""

    nll: np.ndarray  # nats
    tokens: np.ndarray
    bytes: np.ndarray

    def bits_per_byte(self) -> float:
        return float(self.nll.sum() / self.bytes.sum() / math.log(2))

    def nats_per_token(self) -> float:
        return float(self.nll.sum() / self.tokens.sum())


@dataclass
class RunFiles:
    """One run as its files tell it; arrays are empty unless it is complete."""

    rung: str
    seed: int
    folder: str  # relative to the ladder
    status: str  # "complete", or in one word why not
    reason: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, dict[str, Any]] = field(default_factory=dict)  # by suite
    correct: dict[Cell, np.ndarray] = field(default_factory=dict)  # bool, by index
    text: dict[str, Text] = field(default_factory=dict)  # by source
    items: dict[Any, str] = field(default_factory=dict)  # cell or source -> digest of what was asked
    chance: dict[Cell, float] = field(default_factory=dict)
    curve: np.ndarray = field(default_factory=lambda: np.empty((0, 3)))  # step, tokens, loss
    head: np.ndarray = field(default_factory=lambda: np.empty((0, 3)))  # step, tokens, gradient norm of its halting
    depth: list[dict[str, Any]] = field(default_factory=list)
    suites: dict[str, dict[str, Any]] = field(default_factory=dict)  # what all other suites state, by name
    ticks: float | None = None  # mean executed per generated token, as recorded
    overlap: dict[str, int] = field(default_factory=dict)  # evaluation items found in training, by source
    files: dict[str, str] = field(default_factory=dict)  # relative path -> sha256

    @property
    def complete(self) -> bool:
        return self.status == "complete"

    @property
    def failed(self) -> bool:
        return self.status in _FAILURES

    @property
    def pending(self) -> bool:
        return not (self.complete or self.failed)

    @property
    def devices(self) -> set[str]:
        """Names of the devices that the sessions of this run were trained on."""
        return {str(session["device"]) for session in self.provenance.get("sessions", []) if "device" in session}


@dataclass(frozen=True)
class Evidence:
    """A whole ladder: its declaration and its runs."""

    folder: Path
    ladder: dict[str, Any]
    control: str
    rungs: list[str]  # the control first, then in the order of the ladder
    seeds: list[int]
    runs: dict[tuple[str, int], RunFiles]
    cells: list[Cell]
    sources: list[str]
    trained: dict[str, tuple[int, int]]  # sizes that a task was trained on, where the runs' configuration says so
    timing: Timing | None = None  # training times side by side, if they were measured

    def of(self, rung: str) -> list[RunFiles]:
        """The runs of a rung, by seed."""
        return [self.runs[rung, seed] for seed in self.seeds]

    def seeds_decided(self, rung: str) -> list[int]:
        """The seeds on which both the rung and the control have come to an end."""
        pairs = ((seed, self.runs[rung, seed], self.runs[self.control, seed]) for seed in self.seeds)
        return [seed for seed, mine, theirs in pairs if not (mine.pending or theirs.pending)]

    def accuracy(self, rung: str, seeds: Iterable[int], cell: Cell) -> np.ndarray:
        """Outcomes [seeds, items] of a cell, 1 right and 0 wrong; a failed run got everything wrong."""
        items = next(run.correct[cell].size for run in self.runs.values() if run.complete)
        rows = [self.runs[rung, seed] for seed in seeds]
        return np.array([run.correct[cell] if run.complete else np.zeros(items) for run in rows], dtype=float)

    def text(self, rung: str, seed: int, source: str) -> Text:
        """Likelihood of a source under a run; a failed run guesses every byte uniformly."""
        run = self.runs[rung, seed]
        if run.complete:
            return run.text[source]
        like = next(run.text[source] for run in [*self.of(rung), *self.runs.values()] if run.complete)
        return Text(like.bytes * WORST_BITS_PER_BYTE * math.log(2), like.tokens, like.bytes)

    def pairing(self, rung: str, source: str) -> str:
        """How a source's likelihoods compare with the control's: by ``items``, by the whole ``text``, or "" not at all.

        Under one tokenizer both were asked the same windows. Under two they were not, but bits per byte of the whole
        text still compare, if it was the same text to the byte.
        """
        runs = [run for run in (*self.of(rung), *self.of(self.control)) if run.complete]
        if len({run.items[source] for run in runs}) == 1:
            return "items"
        return "text" if len({run.text[source].bytes.sum() for run in runs}) == 1 else ""

    def overlapping(self, names: Iterable[str]) -> int:
        """The largest number of evaluation items of these sources that a run found in its training data."""
        found = [run.overlap.get(name, 0) for run in self.runs.values() for name in names]
        return max(found, default=0)

    def bits(self, rung: str, seeds: Iterable[int], source: str) -> np.ndarray:
        """[seeds, items] whose mean is bits per byte: each item's bits over the mean number of bytes."""
        texts = [self.text(rung, seed, source) for seed in seeds]
        return np.array([text.nll / math.log(2) / text.bytes.mean() for text in texts])


def gather(folder: str | Path) -> Evidence:
    """Read and verify a ladder's folder. Edited, mixed or foreign files are a UserError naming file and
    line."""
    folder = Path(folder)
    ladder = _ladder(folder)
    control, seeds = ladder["control"], ladder["seeds"]
    rungs = [control, *(rung for rung in ladder["rungs"] if rung != control)]
    runs = {}
    for rung in rungs:
        for seed in seeds:
            place = ladder["runs"].get(rung, {}).get(str(seed)) or f"{rung}-s{seed}"
            declared = ladder.get("hashes", {}).get(rung, {}).get(str(seed))
            runs[rung, seed] = _run(folder, rung, seed, place, declared)
    complete = [run for run in runs.values() if run.complete]
    for suite in _COUNTED:
        have = [run for run in complete if suite in run.meta]
        for run in complete:
            if have and suite not in run.meta:
                run.status, run.reason = "not evaluated", f"trained, but without results_{suite}.json"
    complete = [run for run in complete if run.complete]
    _same_items(complete)
    cells = sorted({cell for run in complete for cell in run.correct}, key=lambda c: (c.task, c.regime, c.size))
    sources = sorted({source for run in complete for source in run.text})
    trained = _trained(folder / complete[0].folder / "config.json") if complete else {}
    timing = read_timing(folder / "timing.json", rungs)
    return Evidence(folder, ladder, control, rungs, seeds, runs, cells, sources, trained, timing)


def _trained(config: Path) -> dict[str, tuple[int, int]]:
    """The training sizes of every task that occurs once in a run's configuration."""
    sources = read_json(config).get("data", {}).get("sources", []) if config.is_file() else []
    tasks = [source["task"] for source in sources if source.get("kind") == "task"]
    kinds = [task["kind"] for task in tasks]
    return {t["kind"]: (t["train"][0], t["train"][1]) for t in tasks if kinds.count(t["kind"]) == 1}


def _ladder(folder: Path) -> dict[str, Any]:
    path = folder / "ladder.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a ladder: it has no ladder.json; give the folder that a ladder wrote")
    ladder = read_json(path)
    for name, sort in (("name", str), ("control", str), ("seeds", list), ("rungs", dict), ("runs", dict)):
        if not isinstance(ladder, dict) or not isinstance(ladder.get(name), sort):
            raise UserError(f"{path}: '{name}' is missing or not a {sort.__name__}; run the ladder again")
    if ladder["control"] not in ladder["rungs"]:
        hint = did_you_mean(ladder["control"], ladder["rungs"])
        raise UserError(f"{path}: the control '{ladder['control']}' is not one of the rungs{hint}")
    if not ladder["seeds"] or len(set(ladder["seeds"])) != len(ladder["seeds"]):
        raise UserError(f"{path}: 'seeds' must be a list of different numbers, at least one")
    shown = {"factor", "fields", "command"}  # free text; names and paths stay as they are
    rungs = {
        rung: {k: redact(v) if k in shown else v for k, v in about.items()} for rung, about in ladder["rungs"].items()
    }
    return {**ladder, "rungs": rungs, "command": redact(ladder.get("command")), "ladder": redact(ladder.get("ladder"))}


def _run(folder: Path, rung: str, seed: int, place: str, declared: str | None = None) -> RunFiles:
    """A run's files; those of a run whose hash is not the ``declared`` one are no evidence about it."""
    here = folder / place
    run = RunFiles(rung, seed, place, "missing", "has not been run")
    if not here.is_dir():
        return run
    summary = redact(read_json(here / "summary.json")) if (here / "summary.json").is_file() else {}
    if declared and summary and summary.get("hash") != declared:
        run.reason = "holds another run"
        return run
    if (here / "metrics.jsonl").is_file():
        lines = read_lines(here / "metrics.jsonl")
        run.curve = _curve((line, line.get("loss")) for line in lines)
        run.head = _curve((line, line["grad_norms"].get("halting")) for line in lines if "grad_norms" in line)
    if not (here / "summary.json").is_file():
        run.status, run.reason = "unfinished", "was started but has not come to an end"
        return run
    run.summary = summary
    run.provenance = redact(read_json(here / "provenance.json")) if (here / "provenance.json").is_file() else {}
    run.status = str(run.summary.get("status", "unfinished"))
    run.reason = str(run.summary.get("reason") or "")
    if run.complete:
        try:
            for suite in _MATCHED:
                _read_matches(here, run, suite)
            _read_likelihood(here, run)
        except KeyError as error:
            raise UserError(f"{here}: a record or result has no {error}; evaluate the run again") from None
        if (here / "results_depth.json").is_file():
            run.depth = list(read_json(here / "results_depth.json").get("cells", []))
        run.suites = _others(here)
        if not run.meta and run.complete:
            run.status, run.reason = "not evaluated", "trained, but without results"
    if (here / "data.json").is_file():
        counts = read_json(here / "data.json").get("overlap", {})
        run.overlap = {
            name: max((v for k, v in entry.items() if k in _OVERLAPS), default=0) for name, entry in counts.items()
        }
    names = ["config.json", "summary.json", "metrics.jsonl", "provenance.json", "data.json"]
    names += [
        f"{prefix}{suite}{end}"
        for suite in (*_COUNTED, *run.suites)
        for prefix, end in (("results_", ".json"), ("records/", ".jsonl"))
    ]
    for name in [*names, "results_depth.json"]:
        if (here / name).is_file():
            run.files[name] = hashlib.sha256((here / name).read_bytes()).hexdigest()
    return run


def _curve(values: Iterable[tuple[dict[str, Any], Any]]) -> np.ndarray:
    """(step, tokens, value) of the metric lines that have a value."""
    rows = [
        (line["step"], line.get("tokens", line["step"]), value)
        for line, value in values
        if isinstance(value, int | float) and "step" in line
    ]
    return np.array(rows, dtype=float).reshape(-1, 3)


def _others(here: Path) -> dict[str, dict[str, Any]]:
    """What the suites that are not compared state, where they have come to an end and have cells.

    Their records must be as they were written, and all there; what they add up to, only the suite knows.
    """
    found = {}
    for path in sorted(here.glob("results_*.json")):
        suite = path.stem.removeprefix("results_")
        stated = read_json(path) if suite not in (*_COUNTED, *_DRAWN) else {}
        if not isinstance(stated, dict) or stated.get("status") != "complete" or not stated.get("cells"):
            continue
        records = here / "records" / f"{suite}.jsonl"
        there = len(read_lines(records)) if records.is_file() else 0
        if stated.get("records", there) != there:
            raise UserError(
                f"{path} is about {stated['records']} records but {records} has {there}; evaluate the run again"
            )
        found[suite] = redact(stated)
    return found


def _suite(here: Path, run: RunFiles, suite: str) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The stated results and the records of a suite; None when there are none (or not all of them yet)."""
    results, records = here / f"results_{suite}.json", here / "records" / f"{suite}.jsonl"
    if not results.is_file():
        return None
    stated = read_json(results)
    if stated.get("status") != "complete":
        run.status, run.reason = "not evaluated", f"results_{suite}.json is {stated.get('status')}"
        return None
    if not records.is_file():
        raise UserError(f"{results} has no records beside it ({records} is missing); evaluate the run again")
    run.meta[suite] = redact(stated.get("meta", {}))
    return stated, read_lines(records)


def _read_matches(here: Path, run: RunFiles, suite: str) -> None:
    found = _suite(here, run, suite)
    if found is None:
        return
    stated, records = found
    groups: dict[Cell, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[Cell(record["task"], record["size"], record["regime"])].append(record)
    counted: dict[Any, tuple[int, float]] = {}
    for cell, group in groups.items():
        group.sort(key=lambda record: record["index"])
        run.correct[cell] = np.array([record["correct"] for record in group], dtype=bool)
        run.items[cell] = _digest((r["index"], r["question"], r["answer"]) for r in group)
        counted[cell] = len(group), float(run.correct[cell].mean())
    ticks = [record["ticks"] for record in records if record.get("ticks") is not None]
    run.ticks = float(np.mean(ticks)) if ticks and run.ticks is None else run.ticks
    claims: dict[Any, tuple[int, float]] = {}
    for entry in stated.get("cells", []):
        cell = Cell(entry["task"], entry["size"], entry["regime"])
        claims[cell] = entry["n"], entry["accuracy"]
        if entry.get("chance") is not None:
            run.chance[cell] = float(entry["chance"])
    _agree(here / f"results_{suite}.json", claims, counted, "accuracy")


def _read_likelihood(here: Path, run: RunFiles) -> None:
    found = _suite(here, run, "likelihood")
    if found is None:
        return
    stated, records = found
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["source"]].append(record)
    for source, group in groups.items():
        group.sort(key=lambda record: record["index"])
        worst = WORST_BITS_PER_BYTE * math.log(2)
        nll = [r["bytes"] * worst if r["nll"] is None else r["nll"] for r in group]  # null: it was not finite
        columns = (nll, [r["tokens"] for r in group], [r["bytes"] for r in group])
        run.text[source] = Text(*(np.array(column, dtype=float) for column in columns))
        run.items[source] = _digest((r["index"], r["bytes"]) for r in group)
        if run.text[source].bytes.sum() <= 0:
            raise UserError(f"{here}/records/likelihood.jsonl: the source '{source}' has no bytes")
    counted = {s: (int(text.bytes.sum()), text.bits_per_byte()) for s, text in run.text.items()}
    claims = {e["source"]: (int(e["bytes"]), e["bits_per_byte"]) for e in stated.get("likelihood", [])}
    _agree(here / "results_likelihood.json", claims, counted, "bits per byte")


def _digest(rows: Iterable[tuple[Any, ...]]) -> str:
    return hashlib.sha256("\n".join(repr(row) for row in rows).encode()).hexdigest()[:16]


def _agree(path: Path, claims: dict[Any, Any], counted: dict[Any, Any], what: str) -> None:
    """Stated results must be what the records add up to."""
    for name in sorted({*claims, *counted}, key=str):
        label = name if isinstance(name, str) else ", ".join(str(part) for part in name)
        (n, value), (records, actual) = claims.get(name, (0, 0.0)), counted.get(name, (0, 0.0))
        if n != records or value is None or abs(value - actual) > 1e-4 * max(1.0, abs(actual)):
            raise UserError(
                f"{path}: {what} of {label} is stated as {value} (n = {n}) but its records give {actual:.6g}"
                f" (n = {records}): one of the two was edited; evaluate the run again"
            )


def _same_items(complete: list[RunFiles]) -> None:
    """A paired comparison needs the same items under the same conditions everywhere.

    Windows of text are items of their tokenizer: they need to agree among the runs that share one.
    """
    for suite in _COUNTED:
        first: dict[str, RunFiles] = {}
        for run in complete:
            tokenizer = str(run.meta.get(suite, {}).get("tokenizer")) if suite == "likelihood" else ""
            _same(first.setdefault(tokenizer, run), run, suite)


def _same(first: RunFiles, run: RunFiles, suite: str) -> None:
    end = "nothing is paired, so nothing can be compared; evaluate them again with one grid and one seed"
    for name in ("items_digest", "grid_version", "decoding"):
        mine, theirs = (r.meta.get(suite, {}).get(name) for r in (first, run))
        if mine != theirs:
            what = {"items_digest": "different items"}.get(name, f"another {name.replace('_', ' ')}")
            raise UserError(f"{first.folder} and {run.folder} were evaluated on {what} ({suite}): {end}")
    asked = [{k: v for k, v in r.items.items() if isinstance(k, str) == (suite == "likelihood")} for r in (first, run)]
    odd = [name for name in {**asked[0], **asked[1]} if asked[0].get(name) != asked[1].get(name)]
    if odd:
        label = odd[0] if isinstance(odd[0], str) else ", ".join(str(part) for part in odd[0])
        raise UserError(f"{first.folder} and {run.folder} were evaluated on different items ({label}): {end}")
