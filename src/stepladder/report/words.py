"""Numbers and verdicts as plain English, the same in every output."""

from __future__ import annotations

from typing import Any

_SCALES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
MINUS = "\N{MINUS SIGN}"
UNKNOWN = "\N{EN DASH}"


def number(value: float | None, digits: int = 3) -> str:
    """A plain number with a fixed number of decimals."""
    return UNKNOWN if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def percent(value: float | None) -> str:
    """A fraction as a percentage: 0.6132 -> 61.3 %."""
    return UNKNOWN if value is None else f"{number(100 * value, 1)} %"


def signed(value: float | None, unit: str) -> str:
    """A difference in its unit: points of accuracy (x 100) or bits per byte."""
    if value is None:
        return UNKNOWN
    shown, digits = (100 * value, 1) if unit == "accuracy" else (value, 3)
    text = f"{round(shown, digits) + 0.0:+.{digits}f}"  # + 0: what rounds to nothing has no sign of its own
    return text.replace("-", MINUS)


def level(value: float | None, unit: str) -> str:
    """A measured level in its unit."""
    return percent(value) if unit == "accuracy" else number(value)


def interval(low: float | None, high: float | None, unit: str) -> str:
    """``low to high``, or a dash where one seed knows no interval."""
    return UNKNOWN if low is None or high is None else f"{signed(low, unit)} to {signed(high, unit)}"


def probability(p: float | None) -> str:
    """A p-value to three decimals, never 0."""
    return UNKNOWN if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def quantity(value: float | None, unit: str = "") -> str:
    """A large number with an SI prefix: 1234567 -> 1.23 M."""
    if value is None:
        return UNKNOWN
    for scale, prefix in _SCALES:
        if abs(value) >= 0.9995 * scale:  # which is 1 with three digits
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return UNKNOWN
    for size, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if seconds < 90 * size or unit == "h":
            count = seconds / size
            return f"{count:.{0 if count >= 20 else 1}f} {unit}"
    raise AssertionError("hours hold any duration")


def residual(value: float | None) -> str:
    """A mismatch in per cent, signed."""
    return UNKNOWN if value is None else f"{100 * value:+.2f} %".replace("-", MINUS)


def verdict_text(comparison: dict[str, Any]) -> str:
    """The word, with what it needs: ``inconclusive (needs 4 more seeds)``."""
    if comparison["word"] != "inconclusive":
        return str(comparison["word"])
    needs = comparison["needs"]
    if needs is None:
        return "inconclusive (needs more items, not seeds)"
    return f"inconclusive (needs {needs} more seed{'s' if needs != 1 else ''})"


def found(comparison: dict[str, Any], confidence: str) -> str:
    """What was measured: ``+5.2 points, 95 % interval +1.1 to +9.3``."""
    unit = comparison["unit"]
    text = signed(comparison["difference"], unit) + (" points" if unit == "accuracy" else "")
    if comparison["low"] is None:
        return text
    return f"{text}, {confidence} interval {interval(comparison['low'], comparison['high'], unit)}"


def answer(about: dict[str, Any], confidence: str) -> str:
    """A rung's honest answer, a sentence for every primary measure (plain mappings of comparisons)."""
    primary = [c for c in about["primary"] if c["difference"] is not None]
    why = refusal(about)
    if not primary:
        return f"{why or 'Nothing was measured'}."
    measured = [(c, found(c, confidence)) for c in primary]
    if why:
        return f"{why}. Measured: " + "; ".join(f"{text} in {c['label']}" for c, text in measured) + "."
    return " ".join(f"{c['word'].capitalize()} in {c['label']} ({text}{_settled_by(c)})." for c, text in measured)


def _settled_by(comparison: dict[str, Any]) -> str:
    if comparison["refusal"]:
        return f"; {comparison['refusal']}"
    text = verdict_text(comparison)
    return f"; {text[text.index('(') + 1 : -1]}" if "(" in text else ""


def refusal(about: dict[str, Any]) -> str:
    """Why nothing is claimed about a rung; '' if it is judged."""
    if about["refused"] == "not judged":
        return "A floor, shown for scale and not judged"
    if about["refused"] == "not matched":
        if about["residual"] is None:
            return "Not matched: the ladder does not say how its cost compares with the control's, so no verdict"
        return f"Not matched: it differs from the control's cost by {residual(about['residual'])}, so no verdict"
    if about["pending"]:
        return f"No claim yet: seed {', '.join(map(str, about['pending']))} has no result, of the rung or the control"
    return "No claim: one seed says nothing about the next" if about["refused"] else ""


def headline(verdict: dict[str, Any]) -> str:
    """The ladder in one or two sentences."""
    runs, contenders = verdict["runs"], [a for a in verdict["rungs"].values() if a["role"] == "contender"]
    waiting = sum(run["pending"] for run in runs)
    if not any(c["difference"] is not None for about in contenders for c in about["primary"]):
        if not waiting:
            return "Nothing can be said: every run came to an end, but nothing of them can be compared."
        return f"Nothing can be said yet: {_without_result(waiting, len(runs))}."
    seeds = len(verdict["seeds"])
    if seeds == 1:
        return "One seed supports no claim: what follows are measurements, not verdicts."
    words = [{c["word"] for c in about["primary"]} for about in contenders if about["primary"]]
    total = len(contenders)
    better, worse = (sum(word in found for found in words) for word in ("better", "worse"))
    same = sum(found == {"equivalent"} for found in words)
    unsettled = sum("inconclusive" in found and not found & {"better", "worse"} for found in words)
    refused = sum(bool(found & {"no claim", "not matched"}) for found in words)
    parts = [
        (better, "better than the control on at least one primary measure"),
        (worse, "worse on at least one"),
        (same, "equivalent on all"),
        (unsettled, "undecided on at least one and different on none"),
        (refused, "without a verdict"),
    ]
    said = "; ".join(f"{count} {'is' if count == 1 else 'are'} {what}" for count, what in parts if count)
    rungs = f"{total} rung{'s' if total != 1 else ''}"
    text = f"Of {rungs} compared with {verdict['control']} over {seeds} seeds: {said}."
    if waiting:
        text += f" The ladder is unfinished: {_without_result(waiting, len(runs))} yet."
    return text


def _without_result(waiting: int, total: int) -> str:
    return f"{waiting} of {total} runs {'has' if waiting == 1 else 'have'} no result"


def confidence(alpha: float) -> str:
    """``95 %`` for alpha = 0.05."""
    return f"{100 * (1 - alpha):g} %"
