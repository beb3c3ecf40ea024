"""What rungs that decide their ticks gain by it, from results_halting.json and the metrics of their heads.

The suite (eval.halting) defines the exits that are compared. Nothing is judged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepladder.report.evidence import Evidence, RunFiles

HALTING = "halting"
_MEANS = ("mean_ticks", "accuracy", "learned", "random", "fixed", "oracle", "oracle_ticks")
_GAINS = ("gain", "over_fixed")


def choosers(evidence: Evidence) -> dict[str, list[RunFiles]]:
    """The runs of every rung that decides its ticks and was evaluated on that."""
    found = {
        rung: [run for run in evidence.of(rung) if run.suites.get(HALTING, {}).get("chooses")]
        for rung in evidence.rungs
    }
    return {rung: runs for rung, runs in found.items() if runs}


def exits(evidence: Evidence) -> list[dict[str, Any]]:
    """A row for every such rung and task: means over cells and seeds of what the suite ``halting`` found.

    gain and over_fixed: ``{"mean", "sd", "stderr"}``: the spread is over seeds; with one seed there is none, and the
    standard error over its items stands in. over_trained: likewise, its accuracy less that of ``fixed_rungs`` at as
    many executed ticks; None if these are not on both sides. error: calibration error at and beyond the training sizes.
    """
    rows = []
    for rung, runs in choosers(evidence).items():
        for task in dict.fromkeys(cell["task"] for run in runs for cell in run.suites[HALTING]["cells"]):
            groups = [_of(run, "cells", task) for run in runs]
            row: dict[str, Any] = {"rung": rung, "task": task, "seeds": len(runs)}
            for name in _MEANS:
                row[name] = float(np.mean([np.mean([cell[name] for cell in group]) for group in groups]))
            row |= {name: _gain(groups, name) for name in _GAINS}
            row["over_trained"] = _over_trained(evidence, runs, task)
            marks = [entry for run in runs for entry in _of(run, "calibration", task)]
            row["error"] = {
                regime: _mean([entry["error"] for entry in marks if entry["regime"] == regime])
                for regime in ("iid", "ood")
            }
            tied = [entry["ticks_and_size"] for run in runs for entry in _of(run, "informative", task)]
            row["ticks_and_size"] = _mean([value for value in tied if value is not None])
            rows.append(row)
    return rows


def standing(run: RunFiles, task: str) -> tuple[float, float]:
    """Mean executed ticks and accuracy of a task's answer tokens as the model runs, means over cells."""
    cells = _of(run, "cells", task)
    return float(np.mean([cell["mean_ticks"] for cell in cells])), float(np.mean([cell["accuracy"] for cell in cells]))


def standings(evidence: Evidence, task: str) -> dict[str, dict[str, float]]:
    """By rung, of fixed ticks or deciding: mean ``ticks`` and ``accuracy`` on a task, ``low`` and ``high`` of seeds."""
    found = {}
    for rung, runs in {**fixed_rungs(evidence), **choosers(evidence)}.items():
        ticks, accuracy = np.array([standing(run, task) for run in runs]).T
        found[rung] = {
            "ticks": ticks.mean(),
            "accuracy": accuracy.mean(),
            "low": accuracy.min(),
            "high": accuracy.max(),
        }
    return found


def fixed_rungs(evidence: Evidence) -> dict[str, list[RunFiles]]:
    """The evaluated runs of rungs that differ from the control at most in a number of ticks that is fixed."""
    about = evidence.ladder["rungs"]
    found = {
        rung: [run for run in evidence.of(rung) if HALTING in run.suites and not run.suites[HALTING].get("chooses")]
        for rung in evidence.rungs
        if rung == evidence.control or str(about[rung].get("factor")).startswith("model.ticks:")
    }
    return {rung: runs for rung, runs in found.items() if runs}


def _over_trained(evidence: Evidence, runs: Sequence[RunFiles], task: str) -> dict[str, float | None] | None:
    """The accuracy of runs less what those of ``fixed_rungs`` of the same seed have at equal executed ticks.

    Between two numbers of ticks that were trained, accuracy is taken as linear: some tokens here, the others there.
    """
    groups = fixed_rungs(evidence).values()
    found = []
    for run in runs:
        ticks, accuracy = standing(run, task)
        rivals = sorted(standing(each, task) for group in groups for each in group if each.seed == run.seed)
        if not rivals or not rivals[0][0] <= ticks <= rivals[-1][0]:
            return None
        known, reached = np.array(rivals).T
        found.append(accuracy - float(np.interp(ticks, known, reached)))
    spread = float(np.std(found, ddof=1)) if len(found) > 1 else None
    return {"mean": float(np.mean(found)), "sd": spread, "stderr": None}


def _of(run: RunFiles, name: str, task: str) -> list[dict[str, Any]]:
    return [entry for entry in run.suites[HALTING].get(name, []) if entry["task"] == task]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _gain(groups: list[list[dict[str, Any]]], name: str) -> dict[str, float | None]:
    means = [float(np.mean([cell[name] for cell in group])) for group in groups]
    errors = [cell[f"{name}_stderr"] for cell in groups[0]]
    alone = len(means) == 1 and None not in errors
    return {
        "mean": float(np.mean(means)),
        "sd": float(np.std(means, ddof=1)) if len(means) > 1 else None,
        "stderr": float(np.sqrt(np.square(errors).sum()) / len(errors)) if alone else None,
    }


def histogram(runs: Sequence[RunFiles], task: str) -> dict[str, dict[int, float]]:
    """Share of a task's answer tokens by executed ticks, mean over seeds, at ("iid") and beyond training sizes."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        regimes = {cell["size"]: cell["regime"] for cell in _of(run, "cells", task)}
        rows = _of(run, "histogram", task)
        for regime in dict.fromkeys(regimes.values()):
            mine = [row for row in rows if regimes[row["size"]] == regime]
            total = sum(row["tokens"] for row in mine)
            bars = found.setdefault(regime, {})
            for row in mine:
                ticks = round(row["ticks"])
                bars[ticks] = bars.get(ticks, 0.0) + row["tokens"] / total / len(runs)
    return found


def fixed(runs: Sequence[RunFiles], task: str) -> dict[int, float]:
    """Accuracy of answer tokens by a tick budget that is the same for all, mean over cells and seeds."""
    found: dict[int, list[float]] = {}
    for row in (row for run in runs for row in _of(run, "fixed", task)):
        found.setdefault(int(row["ticks"]), []).append(row["accuracy"])
    return {ticks: float(np.mean(values)) for ticks, values in sorted(found.items())}


def budget(runs: Sequence[RunFiles]) -> int:
    """The most ticks that these runs may take."""
    return max(int(run.suites[HALTING]["executed"]["budget"]) for run in runs)


def executed(runs: Sequence[RunFiles]) -> dict[str, float | None]:
    """Mean over runs of the FLOPs per token at executed ticks: ``flops`` place by place, ``flops_batch`` as batched."""
    stated = [run.suites[HALTING]["executed"] for run in runs if run.suites.get(HALTING, {}).get("chooses")]
    return {name: _mean([about[name] for about in stated]) for name in ("flops", "flops_batch", "batch_rows")}


def heads(evidence: Evidence) -> dict[str, dict[str, Any]]:
    """Of every rung with a halting head: the median of its gradient's norm, and whether it ever was anything but 0."""
    found = {}
    for rung in evidence.rungs:
        norms = [run.head[:, 2] for run in evidence.of(rung) if len(run.head)]
        if norms:
            values = np.concatenate(norms)
            found[rung] = {"median": float(np.median(values)), "dead": not values.any(), "lines": len(values)}
    return found
