"""The four success criteria that the ancestors stated and never computed, each with its interval and a word.

``met``: the whole interval is on the good side of the threshold; ``not met``: the whole interval is on the
other; ``unclear``: it straddles; ``no claim``: fewer than three seeds, or the rung may not be judged; ``not
measured``. Training time is best measured side by side, in rounds (report.timing): then three rounds will do, and
it does not matter which runs have come to their end.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from stepladder.core import stats
from stepladder.report.comparison import Comparison
from stepladder.report.evidence import Evidence

GAIN = 0.05  # points of accuracy at the training sizes
TIME = 2.0  # of the control's training seconds
COLLAPSE = 1.1  # of the control's perplexity
SEEDS = 3


def criteria(
    evidence: Evidence, rung: str, primary: list[Comparison], refused: str, alpha: float
) -> list[dict[str, Any]]:
    """Gain, better beyond the training sizes, training time and perplexity of one rung, in this order.

    ``refused``: the word that stands for all of them where the rung may not be judged, or "".
    """
    by_metric = {comparison.metric: comparison for comparison in primary}
    entries = [
        _gain(by_metric.get("accuracy_iid")),
        _beyond(by_metric.get("accuracy_ood")),
        _time(evidence, rung, alpha),
        _perplexity(evidence, rung, alpha),
    ]
    foul = any(c.refusal and c.unit == "bits_per_byte" for c in primary)
    for entry in entries:
        if entry["rounds"]:
            if refused == "not matched" or entry["rounds"] < SEEDS:
                entry["word"] = refused or "no claim"
        elif entry["word"] != "not measured" and (
            refused or len(evidence.seeds) < SEEDS or (foul and entry is entries[3])
        ):
            entry["word"] = refused or "no claim"
    return entries


def _entry(name: str, threshold: float, unit: str) -> dict[str, Any]:
    unknown: dict[str, Any] = dict.fromkeys(("value", "low", "high"))
    entry = {"name": name, "threshold": threshold, "unit": unit, **unknown, "word": "not measured"}
    return {**entry, "note": "", "rounds": 0}


def _gain(comparison: Comparison | None) -> dict[str, Any]:
    entry = _entry("at least 5 points more accurate", GAIN, "points")
    if comparison is None or comparison.difference is None:
        return entry
    entry |= {"value": comparison.difference, "low": comparison.low, "high": comparison.high}
    word = "no claim" if comparison.refusal else _word(entry["low"], entry["high"], GAIN, above=True)
    return entry | {"word": word}


def _beyond(comparison: Comparison | None) -> dict[str, Any]:
    entry = _entry("better beyond the training sizes", 0.0, "points")
    if comparison is None or comparison.difference is None:
        return entry
    entry |= {"value": comparison.difference, "low": comparison.low, "high": comparison.high}
    words = {"better": "met", "worse": "not met", "equivalent": "not met", "no claim": "no claim"}
    return entry | {"word": words.get(comparison.word, "unclear")}  # the corrected word: one claim, one standard


def _time(evidence: Evidence, rung: str, alpha: float) -> dict[str, Any]:
    entry = _entry("at most twice the training time", TIME, "ratio")
    timing = evidence.timing
    if timing and (logs := timing.log_ratios(rung, evidence.control)):
        rounds = f"{len(logs)} interleaved round{'s' if len(logs) > 1 else ''}"
        return _ratio(entry | {"rounds": len(logs), "note": f"{rounds} on {timing.device}"}, logs, alpha)
    apart = "the runs were not timed side by side"
    if timing and (errors := [timing.errors[name] for name in (rung, evidence.control) if name in timing.errors]):
        apart += f" ({errors[0]})"
    ratios, devices = [], set()
    for seed in evidence.seeds:
        mine, theirs = evidence.runs[rung, seed], evidence.runs[evidence.control, seed]
        seconds = [run.summary.get("seconds") for run in (mine, theirs) if run.complete]
        if len(seconds) == 2 and all(seconds):
            ratios.append(math.log(float(seconds[0] or 0) / float(seconds[1] or 1)))
            devices |= mine.devices | theirs.devices
    if len(devices) > 1:
        return entry | {"note": "trained on different devices: " + ", ".join(sorted(devices))}
    return _ratio(entry | {"note": apart}, ratios, alpha)


def _perplexity(evidence: Evidence, rung: str, alpha: float) -> dict[str, Any]:
    entry = _entry("perplexity at most 1.1 times the control's", COLLAPSE, "ratio")
    seeds = evidence.seeds_decided(rung)
    worst: dict[str, Any] | None = None
    for source in evidence.sources:
        pairs = [[(evidence.runs[r, s], evidence.text(r, s, source)) for r in (rung, evidence.control)] for s in seeds]
        tokenizers = {run.meta["likelihood"].get("tokenizer") for p in pairs for run, _ in p if run.complete}
        if len(tokenizers) > 1:
            return entry | {"note": "different tokenizers: perplexities are refused, see bits per byte"}
        logs = [mine.nats_per_token() - theirs.nats_per_token() for (_, mine), (_, theirs) in pairs]
        found = _ratio(entry | {"note": source}, logs, alpha)
        if found["value"] is not None and (worst is None or found["value"] > worst["value"]):
            worst = found
    return worst or entry


def _ratio(entry: dict[str, Any], logs: list[float], alpha: float) -> dict[str, Any]:
    """A geometric mean over seeds or rounds with its t interval."""
    if not logs:
        return entry
    d = stats.mean_difference(logs)
    low, high = (float(np.exp(min(end, 700.0))) if d.seeds > 1 else None for end in d.interval(alpha))
    value = math.exp(min(d.mean, 700.0))
    return entry | {"value": value, "low": low, "high": high, "word": _word(low, high, entry["threshold"], above=False)}


def _word(low: float | None, high: float | None, threshold: float, above: bool) -> str:
    if low is None or high is None:
        return "no claim"
    if low >= threshold if above else high <= threshold:
        return "met"
    return "not met" if (high < threshold if above else low > threshold) else "unclear"
