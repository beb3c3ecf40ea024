"""The ``depth`` suite: accuracy over sizes and tick budgets, for models that can take more ticks than trained."""

from __future__ import annotations

from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

from stepladder.core.errors import UserError
from stepladder.eval.decode import evaluating
from stepladder.eval.exact import ask, cells, sheets, tasks
from stepladder.eval.suite import Job, Outcome, suite
from stepladder.models.lm import LanguageModel
from stepladder.models.spec import Spec

NO_LOOP = "this architecture has no loop: one row, ticks = 1"


def budgets(model: LanguageModel, spec: Spec, asked: tuple[int, ...]) -> tuple[int, ...]:
    """The tick budgets to evaluate at: ``asked``, or 1, 2 and 1, 2, 4 times the trained one; (1,) without a loop."""
    if not loops(model):
        return (1,)
    if asked:
        return tuple(sorted(set(asked)))
    trained = int(getattr(spec, "ticks", 1))
    return tuple(sorted({1, 2, trained, 2 * trained, 4 * trained}))


def loops(model: LanguageModel) -> bool:
    """Whether the model takes a tick budget: one without a loop refuses any but 1."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with evaluating(model):
            model(torch.zeros((1, 1), dtype=torch.int64, device=device), ticks=2)
    except UserError:
        return False
    return True


def table(results: dict[str, Any]) -> Table:
    """Accuracy in per cent, a row for every task and size, a column for every tick budget."""
    columns = sorted({cell["ticks"] for cell in results["cells"]})
    shown = Table(title="depth: exact match in %, by tick budget", box=SIMPLE, caption=results.get("note"))
    shown.add_column("task")
    for column in ("size", "", *map(str, columns)):
        shown.add_column(column, justify="right")
    rows: dict[tuple[str, int, str], dict[int, float]] = {}
    for cell in results["cells"]:
        rows.setdefault((cell["task"], cell["size"], cell["regime"]), {})[cell["ticks"]] = cell["accuracy"]
    for (task, size, regime), found in rows.items():
        shown.add_row(task, str(size), regime, *(f"{100 * found[ticks]:.1f}" for ticks in columns))
    return shown


@suite("depth", needs="task", show=table)
def depth(job: Job) -> Outcome:
    """Exact match over sizes and tick budgets, on the items of the algorithmic suite."""
    asked = sheets(job.run, job.config.seed, job.config.samples)
    counts = budgets(job.model, job.run.model, job.config.ticks)
    looped = loops(job.model)
    records: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []

    def advance(share: float) -> None:
        job.advance(share / len(asked) / len(counts))

    for sheet in asked:
        for count in counts:
            ticks = count if looped else None
            answered = ask(job.model, job.tokenizer, sheet, job.config, ticks, advance)
            found += [
                {**cell, "ticks": count, "executed": cell["ticks"]} for cell in cells(answered, dict(tasks(job.run)))
            ]
            records += [{**record, "budget": count} for record in answered]
    items = (item for sheet in asked for item in sheet.items())
    return Outcome({"cells": found, "budgets": counts, **({} if looped else {"note": NO_LOOP})}, records, items)
