"""A ladder's report: one self-contained page of HTML, the same in Markdown, CSV and LaTeX, the verdict in JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from markupsafe import Markup, escape

from stepladder.core.files import write_atomic, write_json
from stepladder.report import figures, halting, plan_figures, tables, templates, words
from stepladder.report.evidence import Evidence, gather
from stepladder.report.verdict import judge

_COLUMNS = ("algorithmic", "likelihood")  # suites whose results the numbers of a run link to
_RECORDS = {"algorithmic": "records", "vision": "image records", "likelihood": "text records"}


def write(ladder_dir: str | Path) -> Path:
    """Judge the ladder in ``ladder_dir`` and write verdict.json and report.html, .md, .csv and .tex into it.

    Works for a ladder that is not finished: what is missing is listed and nothing is claimed about it. The same
    files give the same bytes. Returns the path of the page. UserError if the files cannot be trusted.
    """
    folder = Path(ladder_dir)
    evidence = gather(folder)
    verdict = judge(evidence)
    page = render(evidence, verdict)
    write_json(folder / "verdict.json", verdict)
    write_atomic(folder / "report.md", tables.report_markdown(verdict))
    write_atomic(folder / "report.csv", tables.report_csv(verdict))
    write_atomic(folder / "report.tex", tables.latex(tables.VERDICT_HEADER, tables.verdict_rows(verdict)))
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def render(evidence: Evidence, verdict: dict[str, Any]) -> str:
    """The page as text."""
    environment = templates.environment()
    environment.filters |= {
        "level": words.level, "signed": words.signed, "number": words.number, "percent": words.percent,
        "quantity": words.quantity, "duration": words.duration, "residual": words.residual,
        "probability": words.probability, "criterion": tables.criterion_value,
        "around": tables.criterion_interval, "gain": tables.gain, "entry": tables.suite_entry,
        "lost": tables.lost,
    }  # fmt: skip
    rungs = verdict["rungs"]
    compared = [about for about in rungs.values() if about["role"] != "control"]
    primary: list[dict[str, Any]] = next((about["primary"] for about in compared if about["primary"]), [])
    troubles = [run for run in verdict["runs"] if run["failed"] or run["pending"]]
    return environment.get_template("page.html.jinja").render(
        v=verdict,
        look=figures.styles(list(rungs)),
        place={rung: number for number, rung in enumerate(rungs)},
        tasks=list(dict.fromkeys(cell.task for cell in evidence.cells)),
        sources=evidence.sources,
        measures=primary if any(c["difference"] is not None for about in compared for c in about["primary"]) else [],
        open=_open(verdict),
        criteria=next((about["criteria"] for about in compared if about["criteria"] and primary), []),
        text={rung: {source: _text(evidence, verdict, rung, source) for source in evidence.sources} for rung in rungs},
        troubles=troubles,
        notes=_notes(verdict),
        confidence=words.confidence(verdict["alpha"]),
        interval=words.interval,
        link=_link,
        others=_others,
        folder=evidence.folder.name,
        plan_losses=list(dict.fromkeys(name for row in verdict["planner"] for name in row["lost"])),
        plan_panels=plan_figures.panels(evidence),
        declared=evidence.ladder["ladder"],
        **_drawings(evidence, verdict),
    )


def _drawings(evidence: Evidence, verdict: dict[str, Any]) -> dict[str, Any]:
    look = figures.styles(list(verdict["rungs"]))
    shown = [c for about in verdict["rungs"].values() for c in about["primary"] if c["difference"] is not None]
    labels = {c["metric"]: c["label"] for c in shown}
    forests = [
        {"svg": figures.forest(verdict, metric, look, f"forest{n}"), "label": label}
        for n, (metric, label) in enumerate(labels.items())
    ]
    panels = []
    for n, task in enumerate(dict.fromkeys(cell.task for cell in evidence.cells)):
        depths = [
            {"rung": rung, "svg": figures.depth_map(evidence.of(rung), task, f"depth{n}-{m}")}
            for m, rung in enumerate(evidence.rungs)
            if len({cell["ticks"] for run in evidence.of(rung) for cell in run.depth if cell["task"] == task}) > 1
        ]
        curve = figures.accuracy_by_size(evidence, task, look, f"task{n}")
        panels.append(
            {"task": task, "curve": curve, "grid": figures.heat_map(evidence, task, f"heat{n}"), "depths": depths}
        )
    drawn = any(len(run.curve) > 1 for run in evidence.runs.values())
    learning = figures.learning_curves(evidence, look, "learning") if drawn else ""
    return {"forests": forests, "panels": panels, "learning": learning, **_halting(evidence, verdict, look)}


def _halting(evidence: Evidence, verdict: dict[str, Any], look: dict[str, figures.Style]) -> dict[str, Any]:
    """The drawings of rungs that decide their ticks; empty without any."""
    heads = figures.head_gradients(evidence, look, "heads") if verdict["halting"]["heads"] else ""
    runs, panels = halting.choosers(evidence), []
    for n, row in enumerate(verdict["halting"]["exits"]):
        rung, task = row["rung"], row["task"]
        mine, style, where = runs[rung], look[rung], f"{rung}, {task}"
        shares, most = halting.histogram(mine, task), halting.budget(mine)
        bars = figures.tick_bars(shares, most, style, f"ticks{n}", f"Executed ticks: {where}")
        line = halting.fixed(mine, task)
        curve = figures.exit_curve(row, line, style, f"exits{n}", f"Accuracy over executed ticks: {where}")
        panels.append({"where": where, "bars": bars, "curve": curve})
    standings = []
    for n, task in enumerate(dict.fromkeys(row["task"] for row in verdict["halting"]["exits"])):
        rows = [row for row in verdict["halting"]["exits"] if row["task"] == task]
        places = halting.standings(evidence, task)
        title = f"Accuracy over executed ticks, all rungs: {task}"
        standings.append({"task": task, "svg": figures.standings(places, rows, look, f"standing{n}", title)})
    return {"heads": heads, "exits": panels, "standings": standings}


def _open(verdict: dict[str, Any]) -> list[tuple[str, dict[str, Any], float | None]]:
    """(rung, comparison, seconds of training that would settle it) for everything inconclusive."""
    found = []
    control = verdict["rungs"][verdict["control"]]["cost"]["seconds"]
    for rung, about in verdict["rungs"].items():
        for c in about["primary"]:
            if c["word"] == "inconclusive":
                pair = [control, about["cost"]["seconds"]]
                known = c["needs"] is not None and None not in pair
                found.append((rung, c, c["needs"] * sum(pair) if known else None))
    return found


def _text(evidence: Evidence, verdict: dict[str, Any], rung: str, source: str) -> dict[str, float | None]:
    runs = [run for run in verdict["runs"] if run["rung"] == rung and source in run["bits_per_byte"]]
    same = [c for c in verdict["rungs"][rung]["primary"] if c["metric"] == f"bits_per_byte:{source}"]
    return {
        "bits": float(np.mean([run["bits_per_byte"][source] for run in runs])) if runs else None,
        "perplexity": float(np.exp(np.mean(np.log([run["perplexity"][source] for run in runs])))) if runs else None,
        "difference": same[0]["difference"] if same else None,
    }


def _notes(verdict: dict[str, Any]) -> list[str]:
    """The notes of all primary comparisons, each with the measures it is about."""
    found: dict[str, list[str]] = {}
    for rung, about in verdict["rungs"].items():
        for c in about["primary"]:
            for note in c["notes"]:
                text = note if note.startswith((f"{rung}:", f"{verdict['control']}:")) else f"{rung}: {note}"
                labels = found.setdefault(text, [])
                if c["label"] not in labels:
                    labels.append(c["label"])
    return [f"{note} ({', '.join(labels)})" for note, labels in found.items()]


def _link(run: dict[str, Any], name: str, text: str) -> str:
    """A link into a run's folder, or the bare text when the file is not there."""
    if name not in run["files"] or text == words.UNKNOWN:
        return escape(text)
    return Markup('<a href="{}">{}</a>').format(quote(f"{run['folder']}/{name}"), text)


def _others(run: dict[str, Any]) -> list[tuple[str, str]]:
    """(file, label) of a run's records and of what suites found that have no column."""
    records = [(f"records/{suite}.jsonl", label) for suite, label in _RECORDS.items()]
    stated = [name for name in run["files"] if name.startswith("results_")]
    suites = [(name, name[len("results_") : -len(".json")]) for name in stated]
    return [pair for pair in [*records, *suites] if pair[0] in run["files"] and pair[1] not in _COLUMNS]
