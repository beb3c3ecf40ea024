"""Suites beside the compared ones: what they state, averaged over seeds, as plain data. Nothing is judged here.

A suite whose results have ``cells`` and, under ``by``, the name of one of their fields is shown as a table: rungs by
the values of that field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepladder.report.evidence import Evidence, RunFiles

_OWN = ("halting", "planner")  # suites with a section of their own
_SPREAD = {"task", "kind", "size", "regime", "depth", "length", "ticks", "source"}
"""Fields of cells that say where a cell stands: what a table by one of them averages over."""


def tables(evidence: Evidence) -> list[dict[str, Any]]:
    """One table for every suite that has a field to go by: see ``_entry`` for what stands under a rung and a value."""
    names = sorted({name for run in evidence.runs.values() for name in run.suites if name not in _OWN})
    found = []
    for name in names:
        stated = [run.suites[name] for run in evidence.runs.values() if name in run.suites]
        by = stated[0].get("by")
        if not isinstance(by, str):
            continue
        values = _values([cell[by] for results in stated for cell in results["cells"] if by in cell])
        have = {rung: [run for run in evidence.of(rung) if name in run.suites] for rung in evidence.rungs}
        rows = {rung: [_entry(runs, name, by, value) for value in values] for rung, runs in have.items() if runs}
        notes = [str(results["note"]) for results in stated if results.get("note")]
        if len({str(results.get("meta", {}).get("items_digest")) for results in stated}) > 1:
            notes.append("not all runs were asked the same items, so rungs do not compare")
        others = {field for results in stated for cell in results["cells"] for field in cell if field in _SPREAD}
        found.append(
            {
                "suite": name,
                "by": by,
                "values": values,
                "rungs": rows,
                "over": sorted(others - {by}),
                "missing": sorted({entry["status"] for row in rows.values() for entry in row if entry["status"]}),
                "notes": list(dict.fromkeys(notes)),
            }
        )
    return found


def _values(found: Sequence[Any]) -> list[Any]:
    """The different values: numbers in order, others as they come."""
    values = list(dict.fromkeys(found))
    return sorted(values) if all(isinstance(value, int | float) for value in values) else values


def _entry(runs: Sequence[RunFiles], suite: str, by: str, value: Any) -> dict[str, Any]:
    """Mean accuracy over the cells at a value and over seeds, and the standard deviation over seeds.

    cells, of: how many cells have an accuracy, of how many, over all seeds. status: why those that have none have none.
    """
    cells = [[cell for cell in run.suites[suite]["cells"] if cell.get(by) == value] for run in runs]
    numbers = [[cell["accuracy"] for cell in group if _known(cell)] for group in cells]
    means = [float(np.mean(group)) for group in numbers if group]
    reasons = [str(cell.get("status") or "") for group in cells for cell in group if not _known(cell)]
    return {
        "value": value,
        "mean": float(np.mean(means)) if means else None,
        "sd": float(np.std(means, ddof=1)) if len(means) > 1 else None,
        "cells": sum(map(len, numbers)),
        "of": sum(map(len, cells)),
        "status": "; ".join(sorted({reason for reason in reasons if reason})).replace("_", " "),
    }


def _known(cell: dict[str, Any]) -> bool:
    return cell.get("accuracy") is not None and cell.get("status", "complete") == "complete"
