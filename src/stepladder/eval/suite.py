"""Suites: named evaluations of a run. Each writes records, then results; an unfinished one can't pass for a result."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table

from stepladder.core.config import canonical, validate
from stepladder.core.errors import UserError
from stepladder.core.files import append_lines, read_json, read_lines, source_digest, write_json
from stepladder.core.registry import Registry, did_you_mean
from stepladder.data.base import Task
from stepladder.data.sources import TaskSource
from stepladder.data.stream import Stream
from stepladder.data.tokenizers import Tokenizer
from stepladder.eval.decode import evaluating
from stepladder.models.lm import LanguageModel
from stepladder.models.weights import weights_digest
from stepladder.run import EvalConfig, Loaded, Run, cache_folder, latest_checkpoint, read_state

_PACKAGE = Path(__file__).resolve().parent.parent

GRID_VERSION = "1"
"""Raise when the same configuration comes to mean other items or another rule of scoring."""

Needs = Literal["task", "text", "image", "any"]


@dataclass(frozen=True)
class Job:
    """What a suite is given: a model in evaluation mode, the tokenizer, the run, and what to evaluate.

    run: for a suite that needs a task, with those task sources only that ``config.tasks`` names. stream: the run's
    data, where they were opened already. advance: to be called with a share of the whole work, in 0..1, whenever it
    is done; for the progress display.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    run: Run
    config: EvalConfig
    stream: Stream | None = None
    advance: Callable[[float], object] = float  # which does nothing with it


@dataclass(frozen=True)
class Outcome:
    """What a suite found.

    body: its part of the results (cells, likelihood, checks); or, where there is nothing that it could do, one
    sentence under "message" that says why. records: one line per item. items: what was asked,
    item by item, without what the model made of it: equal digests mean that two runs were asked the same.
    """

    body: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    items: Iterable[Any] = ()
    status: str = "complete"


Evaluate = Callable[[Job], Outcome]
Quick = Callable[[Job], dict[str, float]]
Show = Callable[[dict[str, Any]], Table]
Rehearse = Callable[[Run, EvalConfig], None]


@dataclass
class Suite:
    """A registered suite. Its docstring is that of its function.

    needs: the source without which there is nothing to do. show: complete results as a table for the terminal.
    quick: a brief form for use during training, scores by name. rehearse: raises the UserErrors that a run and a
    configuration are good for, before anything is trained or cleared. texts: whether it reads the run's text sources,
    if there are any.
    """

    name: str
    needs: Needs
    evaluate: Evaluate
    show: Show
    quick: Quick | None
    texts: bool
    rehearse: Rehearse | None

    def missing(self, run: Run) -> bool:
        """Whether ``run`` has nothing that this suite could evaluate."""
        return self.needs != "any" and all(source.serves != self.needs for source in run.data.sources)

    def narrowed(self, run: Run, config: EvalConfig) -> Run:
        """The run as this suite sees it."""
        return restricted(run, config.tasks) if self.needs == "task" else run


SUITES: Registry[Suite] = Registry("suite")
"""All suites; importing ``stepladder.eval`` fills it."""


def suite(
    name: str,
    needs: Needs,
    show: Show,
    quick: Quick | None = None,
    *,
    texts: bool = False,
    rehearse: Rehearse | None = None,
) -> Callable[[Evaluate], Evaluate]:
    """``@suite("depth", needs="task", show=table)`` above a function of a Job registers it; see Suite."""

    def enter(function: Evaluate) -> Evaluate:
        entry = Suite(name, needs, function, show, quick, texts or needs == "text", rehearse)
        entry.__doc__ = function.__doc__
        SUITES.add(name, entry, aliases={name.replace("_", "-")} - {name})
        return function

    return enter


def evaluate(
    loaded: Loaded,
    names: Sequence[str],
    out_dir: str | Path | None = None,
    config: EvalConfig | None = None,
    *,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Run suites ("all" = every one) on a checkpoint; returns what the files ``results_<suite>.json`` then hold.

    out_dir: default the run's directory. config: default the run's own. quiet: no progress on stderr. Results are
    written when a suite is complete; one that is cut short, by whatever, leaves the status "interrupted" and no
    numbers. A suite for which the run has no source is complete and says so in "message". An unknown name, a flawed
    config, a task that the run does not have, and data other than those trained on are a UserError before anything
    runs or is cleared. The model, its mode and torch's generators are as before.
    """
    chosen = selected(names)
    out = loaded.path.parent.parent if out_dir is None else Path(out_dir)
    config = validate(EvalConfig, (config or loaded.run.eval).model_dump(), "eval")
    stream = _stream(loaded, chosen)
    _rehearse(loaded.run, chosen, config)
    meta = _meta(loaded, config)
    results = []
    with evaluating(loaded.model), _progress(quiet) as progress:
        for name in chosen:
            bar = progress.add_task(name, total=1.0)
            entry = SUITES.get(name)
            run, advance = entry.narrowed(loaded.run, config), partial(progress.advance, bar)
            results.append(_run(entry, Job(loaded.model, loaded.tokenizer, run, config, stream, advance), meta, out))
            progress.update(bar, completed=1.0)
    return results


def check(run: Run) -> None:
    """Raise the UserError that evaluating ``run`` would end in: an unknown suite or task, a size without items."""
    _rehearse(run, selected(run.eval.suites), run.eval)
    for task in _tasks(restricted(run, run.eval.tasks)):
        task.batch(run.eval.seed, "valid", np.arange(run.train.eval_samples), task.train)


def done(run_dir: str | Path, run: Run) -> bool:
    """Whether all suites of ``run.eval`` have results and records of the newest checkpoint under this very config."""
    home = Path(run_dir)
    last = latest_checkpoint(home)
    if last is None:
        return False
    asked = {**decisive(run.eval), "run": run.hash(), "step": int(read_state(last)["step"])}
    return all(_holds(home, name, asked) for name in selected(run.eval.suites))


def _holds(home: Path, name: str, asked: dict[str, Any]) -> bool:
    path, records = home / f"results_{name}.json", home / "records" / f"{name}.jsonl"
    if not path.is_file() or not records.is_file():
        return False
    found = read_json(path)
    if not isinstance(found, dict) or found.get("status") not in ("complete", "passed", "failed"):
        return False
    meta = found.get("meta", {})
    same = all(meta.get(field) == value for field, value in asked.items())
    return same and found.get("records") == len(read_lines(records))


def selected(names: Sequence[str]) -> list[str]:
    """The suites that ``names`` (aliases, "all") mean, by their own names, once each."""
    return SUITES.names() if "all" in names else list(dict.fromkeys(map(SUITES.name, names)))


def restricted(run: Run, tasks: Sequence[str]) -> Run:
    """The run without its other tasks and pairs; the names of those that stay are as before. No tasks restrict nothing.

    Raises UserError for a task that the run was not trained on.
    """
    if not tasks:
        return run
    known = list(dict.fromkeys(s.label for s in run.data.sources if s.serves == "task"))
    for name in tasks:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none at all"
            raise UserError(f"eval.tasks: '{name}' is no task of this run{did_you_mean(name, known)}; {has}")
    kept = tuple(s for s in run.data.sources if s.serves != "task" or s.label in tasks)
    return run.model_copy(update={"data": run.data.model_copy(update={"sources": kept})})


def _tasks(run: Run) -> list[Task]:
    return [source.task for source in run.data.sources if isinstance(source, TaskSource)]


def _rehearse(run: Run, chosen: Sequence[str], config: EvalConfig) -> None:
    """Draw one item of every evaluated size, and let every suite say what it would fail on."""
    for task in _tasks(restricted(run, config.tasks)):
        sizes = np.array(task.iid + task.ood, dtype=np.int64)
        task.batch(config.seed, "test", np.zeros(len(sizes), np.int64), sizes)
    for entry in map(SUITES.get, chosen):
        if entry.rehearse is not None:
            entry.rehearse(run, config)


def _stream(loaded: Loaded, chosen: Sequence[str]) -> Stream | None:
    """The run's data, which must be those it was trained on; None if only texts that no suite needs would be read."""
    run, known = loaded.run, loaded.path.parent.parent / "data.json"
    texts = any(source.serves == "text" for source in run.data.sources)
    if texts and not any(SUITES.get(name).texts for name in chosen):
        return None
    stream = Stream(run.data, run.seed, cache_folder(), loaded.tokenizer)
    if known.is_file() and read_json(known).get("fingerprint") != stream.fingerprint():
        raise UserError(
            f"the data of {known.parent} are not those it was trained on (texts, or the code of a task, have changed); "
            f"bring them back, or train the run again under another name"
        )
    return stream


def quick(model: LanguageModel, tokenizer: Tokenizer, run: Run) -> dict[str, float]:
    """Brief scores during training, on validation data: ``algorithmic/<task>``, ``bits_per_byte/<source>``."""
    scores: dict[str, float] = {}
    with evaluating(model):
        for entry in map(SUITES.get, SUITES.names()):
            if entry.quick is not None and not entry.missing(run):
                scores.update(entry.quick(Job(model, tokenizer, entry.narrowed(run, run.eval), run.eval)))
    return scores


def tables(results: Iterable[dict[str, Any]]) -> list[Table]:
    """Results as ``evaluate`` returns them, as tables for the terminal."""
    return [_message(r) if "message" in r else _table(r) for r in results]


def _table(results: dict[str, Any]) -> Table:
    entry, only = SUITES.get(results["suite"]), results["meta"]["tasks"]
    shown = entry.show(results)
    if only and entry.needs == "task":
        shown.title = f"{shown.title or entry.name} (only {', '.join(only)})"
    return shown


def _message(results: dict[str, Any]) -> Table:
    shown = Table(title=results["suite"], show_header=False)
    shown.add_row(escape(results["message"]))
    return shown


def _progress(quiet: bool) -> Progress:
    console = Console(stderr=True)
    columns = ("evaluating {task.description}", BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


def _run(entry: Suite, job: Job, meta: dict[str, Any], out: Path) -> dict[str, Any]:
    """One suite: mark as unfinished, evaluate, write the records, and last of all the results."""
    path, records = out / f"results_{entry.name}.json", out / "records" / f"{entry.name}.jsonl"
    head = {"suite": entry.name, "status": "interrupted", "meta": meta}
    # From here to the last line a kill at any instant leaves a file that says so, never an older run's numbers.
    write_json(path, head)
    records.unlink(missing_ok=True)
    if entry.missing(job.run):
        outcome = Outcome({"message": f"nothing to evaluate: no {entry.needs} source"})
    else:
        outcome = entry.evaluate(job)
    if weights_digest(job.model) != meta["weights"]:
        raise RuntimeError(f"the suite {entry.name} changed the model's weights; its results are void")
    unfinished = records.with_name(f".{records.name}.partial")
    unfinished.unlink(missing_ok=True)
    append_lines(unfinished, outcome.records, durable=True)
    os.replace(unfinished, records)
    digest = hashlib.sha256()
    for item in outcome.items:
        digest.update(canonical(item).encode() + b"\n")
    results = {
        **head,
        "meta": {**meta, "items_digest": digest.hexdigest()},
        "status": outcome.status,
        "records": len(outcome.records),
        **({"memorize": {"applied": False}} if job.config.memorize else {}),  # unless the suite says that it did
        **outcome.body,
    }
    write_json(path, results)
    return results


def decisive(config: EvalConfig) -> dict[str, Any]:
    """What of the config decides the numbers, as it stands in the results."""
    return {
        "seed": config.seed,
        "samples": config.samples,
        "decoding": config.model_dump(include={"temperature", "top_k", "top_p", "max_new_tokens"}),
        "text_tokens": config.text_tokens,
        "ticks": list(config.ticks),
        "lengths": list(config.lengths),
        "adapt_tokens": config.adapt_tokens,
        "memorize": config.memorize and config.memorize.model_dump(mode="json"),
        "tasks": list(config.tasks),
        "transfer": [source.model_dump(mode="json") for source in config.transfer],
        "shots": list(config.shots),
        "grid_version": GRID_VERSION,
    }


def _meta(loaded: Loaded, config: EvalConfig) -> dict[str, Any]:
    model = loaded.model
    return {
        **decisive(config),
        "model": loaded.run.model.kind,
        "params": sum(p.numel() for p in model.parameters()),
        "weights": weights_digest(model),
        "run": loaded.run.hash(),
        "step": loaded.step,
        "tokenizer": loaded.tokenizer.fingerprint,
        "code": source_digest(_PACKAGE),
        "packages": {name: version(name) for name in ("stepladder", "torch", "numpy")},
        "device": next((p.device.type for p in model.parameters()), "cpu"),
    }
