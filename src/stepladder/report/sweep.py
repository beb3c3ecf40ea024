"""What a sweep found, for the terminal and for readers: results.json, results.md, results.csv."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from stepladder.core.files import write_atomic, write_json
from stepladder.report.tables import csv_text, escape_markdown, markdown


def write(home: Path, found: dict[str, Any]) -> None:
    """Write results.json, results.md and results.csv into a sweep's folder."""
    write_json(home / "results.json", found)
    write_atomic(home / "results.md", _markdown(found))
    header = [*found["sweep"]["space"], "objective", "spread", "status", "reason", "runs"]
    rows = [
        [
            *map(_plain, entry["point"].values()),
            entry["objective"],
            entry["spread"],
            entry["status"],
            entry["reason"] or "",
            " ".join(entry["runs"].values()),
        ]
        for entry in found["points"]
    ]
    write_atomic(home / "results.csv", csv_text(header, rows))


def told(values: dict[str, Any]) -> str:
    """A point in words: ``model.ticks=4, train.lr=0.003``."""
    return ", ".join(f"{path}={_short(value)}" for path, value in values.items())


def headline(found: dict[str, Any]) -> str:
    """The best point in one sentence, with its runs."""
    sweep, best = found["sweep"], found["best"]
    if best is None:
        return f"{sweep['name']}: no point has a result"
    spread = f" (spread {_short(best['spread'])} over {len(best['runs'])} seeds)" if best["spread"] is not None else ""
    value = f"best {sweep['metric']} of {sweep['name']}: {_short(best['objective'])}{spread}"
    return f"{value} with {told(best['point'])} ({', '.join(best['runs'].values())})"


def table(found: dict[str, Any]) -> Table:
    """The points of a searched sweep, best first."""
    shown = Table(*_header(found), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for row in _rows(found):
        shown.add_row(*map(escape, row))
    return shown


def _header(found: dict[str, Any]) -> list[str]:
    return [
        *(path.rpartition(".")[2] for path in found["sweep"]["space"]),
        found["sweep"]["metric"],
        "spread",
        "status",
    ]


def _rows(found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            *map(_short, entry["point"].values()),
            _short(entry["objective"]),
            _short(entry["spread"]),
            entry["status"] + (f": {entry['reason']}" if entry["reason"] else ""),
        ]
        for entry in found["points"]
    ]


def _markdown(found: dict[str, Any]) -> str:
    sweep = found["sweep"]
    asked = f"{sweep['method']}, {sweep['goal']} `{sweep['metric']}`, seeds {', '.join(map(str, sweep['seeds']))}."
    note = "The best of many points looks better than it is: confirm it with other seeds, and on test items.\n"
    body = markdown(_header(found), _rows(found))
    return f"# {sweep['name']}\n\n{escape_markdown(headline(found))}\n\n{asked} {note}\n{body}"


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else json.dumps(value)


def _short(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
