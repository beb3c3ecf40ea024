"""What the plans of planners are, from results_planner.json: a row for every rung and source.

The suite (eval.planner) defines the numbers. Nothing is judged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepladder.report.evidence import Evidence, RunFiles

PLANNER = "planner"
_MEANS = ("utilization", "persistence", "entropy", "chunk_mi", "nll")


def planners(evidence: Evidence) -> dict[str, list[RunFiles]]:
    """The runs of every rung whose planner was looked at."""
    found = {rung: [run for run in evidence.of(rung) if PLANNER in run.suites] for rung in evidence.rungs}
    return {rung: runs for rung, runs in found.items() if runs}


def rows(evidence: Evidence) -> list[dict[str, Any]]:
    """A row for every rung with a planner and every source: means over seeds, and what each ablation costs.

    divergence: ``{"mean", "least", "most", "bound"}``, least and most over pairs and seeds. lost: by ablation
    ``{"mean", "sd", "stderr"}`` in nats a token; the spread is over seeds, of one seed the error over its rows.
    """
    found = []
    for rung, runs in planners(evidence).items():
        for source in dict.fromkeys(cell["source"] for run in runs for cell in run.suites[PLANNER]["cells"]):
            cells = [cell for run in runs for cell in run.suites[PLANNER]["cells"] if cell["source"] == source]
            row: dict[str, Any] = {"rung": rung, "source": source, "seeds": len(cells), "plans": cells[0]["plans"]}
            row |= {name: _mean([cell[name] for cell in cells]) for name in _MEANS}
            row["token_mi"] = _mean([cell["token_mi"]["mean"] for cell in cells])
            row["forced"] = _mean([value for cell in cells for value in cell["forced"]])
            apart = [cell["divergence"] for cell in cells if cell["divergence"]]
            row["divergence"] = {
                "mean": _mean([each["mean"] for each in apart]),
                "least": min((each["least"] for each in apart), default=None),
                "most": max((each["most"] for each in apart), default=None),
                "bound": apart[0]["bound"] if apart else None,
            }
            names = dict.fromkeys(name for cell in cells for name in cell["ablated"])
            row["lost"] = {name: _lost([cell["ablated"].get(name) for cell in cells]) for name in names}
            found.append(row)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _lost(entries: Sequence[dict[str, Any] | None]) -> dict[str, float | None]:
    known = [entry for entry in entries if entry and entry["more"] is not None]
    values = [entry["more"] for entry in known]
    return {
        "mean": _mean(values),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "stderr": known[0]["stderr"] if len(values) == 1 else None,
    }
