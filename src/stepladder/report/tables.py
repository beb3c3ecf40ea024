"""Tables of a verdict as Markdown, CSV and LaTeX; whatever a name contains, it stays text.

A table is a header and rows of cells. Cells that are numbers are written as they are (CSV) or were formatted by
the caller; texts are escaped for the format they go to.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from stepladder.report import words

Rows = Iterable[Sequence[Any]]

_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", words.MINUS: r"$-$", words.UNKNOWN: "--",
}  # fmt: skip


def one_line(text: Any) -> str:
    """Text without control characters: they become spaces, so that nothing can start a new line or row."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", str(text)).split())


def escape_markdown(text: Any) -> str:
    """Text that Markdown shows as it is, in a table too; HTML in it is inert."""
    html = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", html)


def escape_latex(text: Any) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(_LATEX.get(letter, letter) for letter in one_line(text))


def escape_csv(cell: Any) -> Any:
    """A cell that a spreadsheet shows and does not run: texts that begin like a formula get an apostrophe."""
    if cell is None or isinstance(cell, bool | int | float):
        return cell
    text = one_line(cell)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def markdown(header: Sequence[str], rows: Rows) -> str:
    """A Markdown table; every column but the first is aligned right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    body = [[escape_markdown(cell) for cell in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in [*lines, *body])


def csv_text(header: Sequence[str], rows: Rows) -> str:
    """RFC 4180, with plain newlines."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([escape_csv(cell) for cell in row] for row in rows)
    return out.getvalue()


def latex(header: Sequence[str], rows: Rows) -> str:
    """A LaTeX tabular in the booktabs style."""
    lines = [r"\begin{tabular}{l" + "r" * (len(header) - 1) + "}", r"\toprule"]
    lines += [" & ".join(map(escape_latex, header)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(escape_latex, row)) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


VERDICT_HEADER = ("rung", "measure", "control", "this rung", "difference", "interval", "p (Holm)", "verdict")


def verdict_rows(verdict: dict[str, Any], family: str = "primary") -> list[list[str]]:
    """One row for every rung and measure, formatted for readers."""
    return [
        [
            rung,
            c["label"],
            words.level(c["control"], c["unit"]),
            words.level(c["rung"], c["unit"]),
            words.signed(c["difference"], c["unit"]),
            words.interval(c["low"], c["high"], c["unit"]),
            words.probability(c["p_holm"]),
            words.verdict_text(c),
        ]
        for rung, about in verdict["rungs"].items()
        for c in about[family]
    ]


def report_csv(verdict: dict[str, Any]) -> str:
    """Every comparison of a verdict, unrounded: one row each."""
    names = (
        "metric", "unit", "control", "rung", "difference", "low", "high", "stderr", "dof", "p", "p_holm",
        "p_equivalent_holm", "margin", "detectable", "word", "needs", "items",
    )  # fmt: skip
    header = ["ladder", "name", "role", "family", "seeds", *names]
    rows = (
        [verdict["ladder"], rung, about["role"], family, len(c["seeds"]), *(c[name] for name in names)]
        for family in ("primary", "tasks")
        for rung, about in verdict["rungs"].items()
        for c in about[family]
    )
    return csv_text(header, rows)


def report_markdown(verdict: dict[str, Any]) -> str:
    """The report as Markdown: answer, verdicts, criteria, costs, runs."""
    parts = [f"# {escape_markdown(verdict['ladder'])}\n", f"{escape_markdown(verdict['headline'])}\n"]
    for rung, about in verdict["rungs"].items():
        if about["role"] != "control":
            marks = "".join(f" _{escape_markdown(mark)}_" for mark in about["marks"])
            parts.append(f"- **{escape_markdown(rung)}**: {escape_markdown(about['answer'])}{marks}")
    parts += ["\n## Verdicts\n", markdown(VERDICT_HEADER, verdict_rows(verdict))]
    parts += [
        f"Differences are rung - control; accuracy in points, bits per byte better when lower. Intervals are"
        f" {words.confidence(verdict['alpha'])} and not corrected; p-values are Holm-corrected over"
        f" {verdict['family']} comparisons.\n"
    ]
    parts += ["## Success criteria\n", markdown(_CRITERIA_HEADER, _criteria_rows(verdict))]
    if verdict["halting"]["exits"]:
        parts += ["## Halting\n", markdown(_EXIT_HEADER, map(_exit_row, verdict["halting"]["exits"]))]
    if verdict["planner"]:
        names = list(dict.fromkeys(name for row in verdict["planner"] for name in row["lost"]))
        lines = [
            [*_plan_row(row), *(lost(row["lost"][n]) if n in row["lost"] else "–" for n in names)]
            for row in verdict["planner"]
        ]
        parts += ["## Planner\n", markdown([*_PLAN_HEADER, *(f"{n}, more" for n in names)], lines)]
    for shown in verdict["suites"]:
        header = ["rung", *(f"{shown['by']} {value}" for value in shown["values"])]
        rows = [[rung, *map(suite_entry, entries)] for rung, entries in shown["rungs"].items()]
        parts += [f"## {escape_markdown(shown['suite'])}\n", markdown([*map(escape_markdown, header)], rows)]
        parts += [f"{escape_markdown(note)}\n" for note in shown["notes"]]
    parts += ["## Costs\n", markdown(_COST_HEADER, _cost_rows(verdict))]
    parts += ["## Runs\n", markdown(_RUN_HEADER, _run_rows(verdict))]
    if verdict["command"]:
        parts += [f"Reproduce: {escape_markdown(verdict['command'])}\n"]
    return "\n".join(parts)


def criterion_value(criterion: dict[str, Any]) -> str:
    """What a criterion came to: ``+6.1 points`` or ``1.49 ×``."""
    value = criterion["value"]
    if value is None:
        return words.UNKNOWN
    return f"{words.signed(value, 'accuracy')} points" if criterion["unit"] == "points" else f"{value:.2f} ×"


def criterion_interval(criterion: dict[str, Any]) -> str:
    """The interval of a criterion: ``+2.0 to +10.2`` or ``1.48 to 1.50``."""
    low, high = criterion["low"], criterion["high"]
    if low is None or high is None:
        return words.UNKNOWN
    return words.interval(low, high, "accuracy") if criterion["unit"] == "points" else f"{low:.2f} to {high:.2f}"


def suite_entry(entry: dict[str, Any]) -> str:
    """Accuracy in a suite with its spread over seeds, ``61.3 ± 2.0 %``, or why there is none."""
    if entry["mean"] is None:
        return entry["status"] or words.UNKNOWN
    spread = "" if entry["sd"] is None else f" ± {words.number(100 * entry['sd'], 1)}"
    return f"{words.number(100 * entry['mean'], 1)}{spread} %"


def gain(found: dict[str, float | None]) -> str:
    """A difference between exits in points with its spread over seeds (of one: its standard error), ``+2.1 ± 0.4``."""
    spread = found["sd"] if found["sd"] is not None else found["stderr"]
    text = words.signed(found["mean"], "accuracy")
    return text if spread is None else f"{text} ± {words.number(100 * spread, 1)}"


_EXIT_HEADER = ("rung", "task", "ticks", "own exits", "learned", "random", "fixed", "oracle", "learned − random")


def _exit_row(row: dict[str, Any]) -> list[str]:
    accuracies = [words.percent(row[name]) for name in ("accuracy", "learned", "random", "fixed", "oracle")]
    return [row["rung"], row["task"], words.number(row["mean_ticks"], 2), *accuracies, gain(row["gain"])]


_CRITERIA_HEADER = ("rung", "criterion", "value", "interval", "word")


def _criteria_rows(verdict: dict[str, Any]) -> list[list[str]]:
    return [
        [
            rung,
            c["name"],
            criterion_value(c),
            criterion_interval(c),
            c["word"] + (f" ({c['note']})" if c["note"] else ""),
        ]
        for rung, about in verdict["rungs"].items()
        for c in about["criteria"]
    ]


_COST_HEADER = (
    "rung",
    "parameters",
    "FLOPs/token",
    "at executed ticks",
    "state",
    "training FLOPs",
    "training time",
    "tokens/s",
    "residual of the match",
)


def _cost_rows(verdict: dict[str, Any]) -> list[list[str]]:
    return [
        [
            rung,
            words.quantity(about["cost"]["params"]),
            words.quantity(about["cost"]["flops_per_token"]),
            words.quantity(about["cost"]["flops"]),
            words.quantity(about["cost"]["state_bytes"], "B"),
            words.quantity(about["cost"]["train_flops"]),
            words.duration(about["cost"]["seconds"]),
            words.quantity(about["cost"]["tokens_per_s"]),
            words.residual(about["residual"]),
        ]
        for rung, about in verdict["rungs"].items()
    ]


_RUN_HEADER = ("run", "status", "accuracy, training sizes", "beyond", "bits per byte", "hash")


def _run_rows(verdict: dict[str, Any]) -> list[list[str]]:
    return [
        [
            run["folder"],
            run["status"] + (f": {run['reason']}" if run["reason"] else ""),
            words.percent(run["accuracy"]["iid"]),
            words.percent(run["accuracy"]["ood"]),
            ", ".join(f"{name} {words.number(value)}" for name, value in run["bits_per_byte"].items()) or words.UNKNOWN,
            (run["hash"] or words.UNKNOWN)[:12],
        ]
        for run in verdict["runs"]
    ]


def lost(entry: dict[str, float | None]) -> str:
    """What an ablation costs, with its spread, as text."""
    spread = entry["sd"] if entry["sd"] is not None else entry["stderr"]
    text = words.UNKNOWN if entry["mean"] is None else f"{entry['mean']:+.3f}".replace("-", words.MINUS)
    return text if spread is None else f"{text} ± {spread:.3f}"


_PLAN_HEADER = ["rung", "source", "used", "stays", "entropy", "I(plan; chunk)", "I(plan; token)", "divergence", "nats"]


def _plan_row(row: dict[str, Any]) -> list[str]:
    numbers = [row["utilization"], row["persistence"]]
    nats = [row["entropy"], row["chunk_mi"], row["token_mi"], row["divergence"]["mean"], row["nll"]]
    return [row["rung"], row["source"], *map(words.percent, numbers), *map(words.number, nats)]
