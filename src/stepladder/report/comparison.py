"""One rung against the control on one measure: the numbers, before any word is given.

Differences are rung - control. Accuracy is a fraction, bits per byte are better when lower.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from stepladder.core import stats
from stepladder.report.evidence import Cell, Evidence

MARGINS = {"accuracy": ("margin", 0.02), "bits_per_byte": ("margin_bits", 0.02)}  # in ladder.json, and default
BIMODAL = 0.1  # seeds whose accuracies spread more than this (sd) do not vary, they disagree
SOLVED = 0.9
NEAR = 0.02  # of chance, or of 1: where two models cannot differ


class Measure(NamedTuple):
    """What is compared: cells of the grid for accuracy, or a text source for bits per byte."""

    metric: str
    label: str
    cells: list[Cell]
    source: str


@dataclass
class Comparison:
    """One rung against the control on one measure. None stands for what is not known."""

    metric: str  # accuracy_iid, accuracy_ood, bits_per_byte:<source>, accuracy_iid:<task>, accuracy_ood:<task>
    label: str
    unit: str  # "accuracy" or "bits_per_byte"
    margin: float
    seeds: list[int]
    rung_by_seed: list[float]
    control_by_seed: list[float]
    items: int = 0
    rung: float | None = None
    control: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    stderr: float | None = None
    dof: float | None = None
    p: float | None = None
    p_holm: float | None = None
    p_equivalent: float | None = None
    p_equivalent_holm: float | None = None
    detectable: float | None = None  # minimum detectable effect at the level that the correction leaves
    word: str = ""
    refusal: str = ""  # why this measure may not be judged
    needs: int | None = None  # further seeds that would settle it
    notes: list[str] = field(default_factory=list)

    @property
    def higher_is_better(self) -> bool:
        return self.unit == "accuracy"


def margins(ladder: dict[str, Any]) -> dict[str, float]:
    """Differences of accuracy and of bits per byte that count as none, as the ladder has them."""
    return {unit: float(ladder.get(name) or default) for unit, (name, default) in MARGINS.items()}


def measures(evidence: Evidence) -> dict[str, list[Measure]]:
    """What a ladder measured: the ``primary`` family and, for exploration, the ``tasks`` family."""
    names = {"iid": "at training sizes", "ood": "beyond training sizes"}
    primary: list[Measure] = []
    tasks: list[Measure] = []
    for regime, name in names.items():
        cells = [cell for cell in evidence.cells if cell.regime == regime]
        if cells:
            primary.append(Measure(f"accuracy_{regime}", f"accuracy {name}", cells, ""))
        for task in dict.fromkeys(cell.task for cell in cells):
            mine = [cell for cell in cells if cell.task == task]
            tasks.append(Measure(f"accuracy_{regime}:{task}", f"{task} {name}", mine, ""))
    for source in evidence.sources:
        primary.append(Measure(f"bits_per_byte:{source}", f"bits per byte on {source}", [], source))
    return {"primary": primary, "tasks": tasks}


def compare(
    evidence: Evidence, rung: str, measure: Measure, margin: dict[str, float], alpha: float
) -> tuple[Comparison, stats.Difference | None]:
    """The rung against the control, paired over the seeds on which both have ended; None without any."""
    seeds, cells = evidence.seeds_decided(rung), measure.cells
    unit = "bits_per_byte" if measure.source else "accuracy"
    c = Comparison(measure.metric, measure.label, unit, margin[unit], seeds, [], [])
    if not seeds:
        return c, None
    mine, theirs = (_outcomes(evidence, name, measure, seeds, rung) for name in (rung, evidence.control))
    c.rung_by_seed, c.control_by_seed = (
        np.mean([cell.mean(axis=1) for cell in arrays], axis=0).tolist() for arrays in (mine, theirs)
    )
    c.rung, c.control = float(np.mean(c.rung_by_seed)), float(np.mean(c.control_by_seed))
    d = stats.paired_difference([a - b for a, b in zip(mine, theirs, strict=True)])
    c.items, c.difference = d.items, d.mean
    if d.seeds > 1:
        c.low, c.high = d.interval(alpha)
        c.stderr, c.dof, c.p, c.p_equivalent = d.stderr, d.dof, d.p(), d.p_equivalent(c.margin)
    c.notes = _notes(evidence, rung, c, cells)
    c.refusal = _refusal(evidence, rung, measure)
    return c, d


def _outcomes(evidence: Evidence, name: str, measure: Measure, seeds: list[int], rung: str) -> list[np.ndarray]:
    """Arrays [seeds, items] for one of the two that are compared; one "item" where only whole texts compare."""
    if not measure.source:
        return [evidence.accuracy(name, seeds, cell) for cell in measure.cells]
    if evidence.pairing(rung, measure.source) == "items":
        return [evidence.bits(name, seeds, measure.source)]
    return [np.array([[evidence.text(name, seed, measure.source).bits_per_byte()] for seed in seeds])]


def _refusal(evidence: Evidence, rung: str, measure: Measure) -> str:
    """Why nothing may be claimed on this measure; '' if it may be judged."""
    found = evidence.overlapping([measure.source] if measure.source else {cell.task for cell in measure.cells})
    if found:
        return f"{found} of the evaluation items occur in the training data"
    if measure.source and not evidence.pairing(rung, measure.source):
        return "evaluated on other stretches of the text than the control, under another tokenizer"
    return ""


def _notes(evidence: Evidence, rung: str, c: Comparison, cells: list[Cell]) -> list[str]:
    """What a reader must know beside the number."""
    notes = []
    for name in (rung, evidence.control):
        dead = [str(seed) for seed in c.seeds if evidence.runs[name, seed].failed]
        if dead:
            notes.append(f"{name}: seed {', '.join(dead)} failed and counts as the worst score")
    if not cells or c.rung is None or c.control is None:
        return notes
    known = [run.chance.get(cell) for run in evidence.runs.values() if run.complete for cell in cells]
    numbers = [value for value in known if value is not None]
    chance = float(np.mean(numbers)) if numbers else 0.0
    if max(c.rung, c.control) < chance + NEAR:
        notes.append("both at chance: neither learnt it")
    if min(c.rung, c.control) > 1 - NEAR:
        notes.append("both near 100 %: too easy to tell them apart")
    for name, by_seed in ((rung, c.rung_by_seed), (evidence.control, c.control_by_seed)):
        if len(by_seed) > 1 and np.std(by_seed, ddof=1) > BIMODAL:
            solved = sum(value >= SOLVED for value in by_seed)
            notes.append(f"{name}: seeds disagree; {solved} of {len(by_seed)} reach {100 * SOLVED:g} %")
    return notes
