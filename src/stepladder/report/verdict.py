"""What the evidence proves: one word for every rung and measure, with the numbers behind it.

``better``, ``worse``
    The difference is told from 0 after Holm's correction over all rungs x primary measures.
``equivalent``
    It is shown to be within the margin (two one-sided tests, corrected likewise). This word comes first: a real
    difference that is too small to matter is equivalent, with a note.
``inconclusive``
    Neither; with the number of seeds that would settle it.
``no claim``
    One seed, a run without a result, or evaluation items found in training.
``not matched``
    The rung does not cost what the control costs: the verdict is refused.
``not judged``
    A floor: shown for scale, no contender.

Primary measures: accuracy averaged over the cells of the training sizes (iid), and over those beyond (ood);
bits per byte of each text source. Accuracies of single tasks are a family of their own, for exploration.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from stepladder.core import stats
from stepladder.report import halting, planner, suites
from stepladder.report.comparison import Comparison, compare, margins, measures
from stepladder.report.criteria import criteria
from stepladder.report.evidence import Evidence, RunFiles
from stepladder.report.words import answer, confidence, headline

MATCHED = 0.01  # a residual beyond this refuses the verdict
PARAMS_MARK, FLOPS_MARK = 0.02, 0.05  # beyond these a rung is marked, whatever it was matched on
POWER = 0.8
_OWN = {"from_step", "started", "argv"}  # facts of provenance that differ by nature


def _start(ladder: Any) -> str | None:
    """What the runs start from, in words; None if from fresh weights."""
    start = ladder.get("start") if isinstance(ladder, dict) else None
    if not start:
        return None
    stage = f"adapters of rank {start['adapters']['rank']}" if start.get("adapters") else "all weights"
    return f"{start['ladder']}, {stage}"


def judge(evidence: Evidence) -> dict[str, Any]:
    """The verdict on a ladder as plain JSON values: the content of verdict.json."""
    alpha = float(evidence.ladder.get("alpha") or 0.05)
    margin = margins(evidence.ladder)
    rungs: dict[str, dict[str, Any]] = {}
    judged: dict[str, list[tuple[Comparison, stats.Difference]]] = {"primary": [], "tasks": []}
    for rung in evidence.rungs:
        about = _about(evidence, rung)
        rungs[rung] = about
        if about["role"] == "control":
            continue
        for family, asked in measures(evidence).items():
            for measure in asked:
                comparison, difference = compare(evidence, rung, measure, margin, alpha)
                about[family].append(comparison)
                comparison.word = about["refused"] or ("no claim" if comparison.refusal else "")
                if difference is not None and not comparison.word:
                    judged[family].append((comparison, difference))
    for comparisons in judged.values():
        _decide(comparisons, alpha)
    for rung, about in rungs.items():
        if about["role"] == "contender":
            about["criteria"] = criteria(evidence, rung, about["primary"], about["refused"], alpha)
        for family in ("primary", "tasks"):
            about[family] = [_plain(asdict(c) | {"higher_is_better": c.higher_is_better}) for c in about[family]]
        if about["role"] != "control":
            about["answer"] = answer(about, confidence(alpha))
    verdict = {
        "ladder": evidence.ladder["name"],
        "control": evidence.control,
        "match": evidence.ladder.get("match"),
        "start": _start(evidence.ladder.get("ladder")),
        "seeds": evidence.seeds,
        "alpha": alpha,
        "margin": margin,
        "family": len(judged["primary"]),
        "headline": "",
        "rungs": rungs,
        "runs": [_run(evidence, run) for run in evidence.runs.values()],
        "perplexity": perplexity_comparable(evidence),
        "timing": asdict(evidence.timing) if evidence.timing else None,
        "halting": {"exits": halting.exits(evidence), "heads": halting.heads(evidence)},
        "planner": planner.rows(evidence),
        "suites": suites.tables(evidence),
        "provenance": _provenance(evidence),
        "command": evidence.ladder.get("command"),
    }
    verdict["headline"] = headline(verdict)
    return verdict


def _about(evidence: Evidence, rung: str) -> dict[str, Any]:
    """A rung's role, cost and standing, before it is compared."""
    about = evidence.ladder["rungs"][rung]
    role = "control" if rung == evidence.control else "floor" if about.get("floor") else "contender"
    complete = [run for run in evidence.of(rung) if run.complete]

    def mean(name: str) -> float | None:
        values = [run.summary.get(name) for run in complete]
        numbers = [value for value in values if value is not None]
        return float(np.mean(numbers)) if numbers else None

    cost = {name: about.get(name) for name in ("params", "flops_per_token", "state_bytes", "train_flops")}
    cost["params"] = mean("params") or cost["params"]
    cost["train_flops"] = mean("train_flops") or cost["train_flops"]
    for name in ("seconds", "tokens_per_s", "peak_memory_bytes"):
        cost[name] = mean(name)
    ticks = [run.ticks for run in complete if run.ticks is not None]
    cost["ticks"] = float(np.mean(ticks)) if ticks else None
    cost |= halting.executed(complete)
    if evidence.timing and evidence.timing.seconds:
        cost["tokens_per_s"] = evidence.timing.tokens_per_s(rung)
    residual = _residual(evidence, about, cost, rung)
    declared = residual is not None if about.get("matched") is None else bool(about["matched"])
    unmatched = evidence.ladder.get("match") == "none"  # asked for: nothing is held equal, costs are only marked
    matched = unmatched or role == "control" or (declared and abs(residual or 0.0) <= MATCHED)
    marks = _marks(evidence, about) if role == "contender" else []
    pending = [seed for seed in evidence.seeds if seed not in evidence.seeds_decided(rung)]
    return {
        "role": role,
        "factor": about.get("factor"),
        "fields": about.get("fields", {}),
        "cost": cost,
        "residual": residual,
        "matched": matched,
        "marks": marks,
        "pending": pending,
        "refused": _refused(evidence, role, matched, pending),
        "primary": [],
        "tasks": [],
        "criteria": [],
        "answer": "",
    }


def _residual(evidence: Evidence, about: dict[str, Any], cost: dict[str, Any], rung: str) -> float | None:
    """The mismatch as declared or as spent (signed, relative to the control), whichever is larger."""
    found = [about.get("residual")]
    match = evidence.ladder.get("match")
    if match in ("params", "train_flops") and rung != evidence.control:
        spent = [run.summary.get(match) for run in evidence.of(evidence.control) if run.complete]
        reference = [value for value in spent if value]
        if reference and cost[match]:
            found.append(cost[match] / float(np.mean(reference)) - 1)
    return max((float(value) for value in found if value is not None), key=abs, default=None)


def _marks(evidence: Evidence, about: dict[str, Any]) -> list[str]:
    """ "not parameter-matched" or "not FLOP-matched" where a cost is far from the control's, whatever was matched."""
    base = evidence.ladder["rungs"][evidence.control]
    marks = []
    for name, limit, word, unit in (
        ("params", PARAMS_MARK, "parameter", "parameters"),
        ("flops_per_token", FLOPS_MARK, "FLOP", "FLOPs per token"),
    ):
        if base.get(name) and about.get(name):
            ratio = about[name] / base[name] - 1
            if abs(ratio) > limit:
                marks.append(f"not {word}-matched ({100 * ratio:+.1f} % {unit})")
    return marks


def _refused(evidence: Evidence, role: str, matched: bool, pending: list[int]) -> str:
    """The word that stands where nothing about a rung may be judged; '' where it may."""
    if role == "floor":
        return "not judged"
    if not matched:
        return "not matched"
    return "no claim" if len(evidence.seeds) < 2 or pending else ""


def _decide(family: list[tuple[Comparison, stats.Difference]], alpha: float) -> None:
    """Words for one family of comparisons, corrected together."""
    different = stats.holm([d.p() for _, d in family])
    equivalent = stats.holm([d.p_equivalent(c.margin) for c, d in family])
    level = alpha / max(1, sum(p >= alpha for p in different))  # what Holm leaves to those still open
    for (c, d), p, p_equivalent in zip(family, different, equivalent, strict=True):
        c.p_holm, c.p_equivalent_holm = p, p_equivalent
        c.detectable = stats.minimum_detectable_effect(d.stderr, d.dof, level, POWER)
        if p_equivalent < alpha:
            c.word = "equivalent"
            if p < alpha:
                c.notes.append("a real difference, smaller than the margin")
        elif p < alpha:
            c.word = "better" if (d.mean > 0) == c.higher_is_better else "worse"
        else:
            c.word = "inconclusive"
            total = stats.seeds_needed(d, c.margin, level, POWER)
            c.needs = None if total is None else max(1, total - d.seeds)


def perplexity_comparable(evidence: Evidence) -> dict[str, Any]:
    """Perplexities are per token: they compare only under one tokenizer."""
    complete = [run for run in evidence.runs.values() if run.complete and run.text]
    names = {str(run.meta["likelihood"].get("tokenizer")) for run in complete}
    if len(names) > 1:
        return {"comparable": False, "reason": f"{len(names)} tokenizers: perplexities are refused, see bits per byte"}
    return {"comparable": bool(complete), "reason": "" if complete else "no text was evaluated"}


def _run(evidence: Evidence, run: RunFiles) -> dict[str, Any]:
    """A run's line in the report."""
    accuracy = {}
    for regime in ("iid", "ood"):
        values = [answers.mean() for cell, answers in run.correct.items() if cell.regime == regime]
        accuracy[regime] = float(np.mean(values)) if values and run.complete else None
    texts = run.text.items() if run.complete else ()
    return {
        "rung": run.rung,
        "seed": run.seed,
        "folder": run.folder,
        "status": run.status,
        "failed": run.failed,
        "pending": run.pending,
        "reason": run.reason,
        "accuracy": accuracy,
        "bits_per_byte": {source: text.bits_per_byte() for source, text in texts},
        "perplexity": {source: math.exp(min(text.nats_per_token(), 700)) for source, text in texts},
        "summary": run.summary,
        "hash": run.summary.get("hash"),
        "files": run.files,
    }


def _provenance(evidence: Evidence) -> dict[str, Any]:
    """Every distinct value of what the runs say about where they come from; what is a run's own is left out."""
    found: dict[str, set[str]] = {}
    for run in evidence.runs.values():
        facts = [leaf for session in run.provenance.get("sessions", []) for leaf in _leaves(session)]
        for suite, meta in run.meta.items():
            facts += [(f"{suite} {name}", meta[name]) for name in ("grid_version", "items_digest") if name in meta]
            facts += [(f"{suite} decoding, {name}", value) for name, value in (meta.get("decoding") or {}).items()]
        for name, value in facts:
            if name not in _OWN:
                found.setdefault(name, set()).add(str(value))
    return {name: sorted(values) for name, values in sorted(found.items())}


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            pairs += _leaves(value, f"{prefix}{name}.")
        elif value is not None:
            pairs.append((f"{prefix}{name}", value))
    return pairs


def _plain(tree: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity, which JSON has not, as None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in tree.items()
    }
