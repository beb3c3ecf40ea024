"""Drawings of one planner: an excerpt coloured by plan, cards of plans, belief over chunks, pairs of plans, moves."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from stepladder.report.evidence import Evidence
from stepladder.report.figures import COLOURS, INK, PAPER, STYLE, WIDTH, svg
from stepladder.report.planner import PLANNER, planners

_COLUMNS = 40
"""Chunks of an excerpt that are drawn."""


def panels(evidence: Evidence) -> list[dict[str, Any]]:
    """For every row the drawings of its first seed: excerpt, cards of plans, belief over chunks, pairs, moves."""
    found: list[dict[str, Any]] = []
    for rung, runs in planners(evidence).items():
        stated = runs[0].suites[PLANNER]
        for cell in stated["cells"]:
            name, where = f"plans{len(found)}", f"{rung}, {cell['source']}"
            colours = palette(cell["plans"])
            dwell = stated["chain"]["dwell"]
            about = ("usage", cell["usage"]), ("dwell", dwell), ("nll", cell["forced"]), ("words", cell["words"])
            cards = [
                {"plan": k, "colour": colours[k], **{name: values[k] for name, values in about}}
                for k in range(cell["plans"])
            ]
            belief = np.array(cell["excerpt"]["plans"], dtype=float)[:_COLUMNS]
            pairs = cell["divergence"]
            found.append(
                {
                    "where": where,
                    "seed": runs[0].seed,
                    "words": _words(cell["excerpt"], colours),
                    "cards": cards,
                    "belief": _map(belief.T, "chunk", f"{name}-b", f"Belief at the starts of chunks: {where}")
                    if len(belief)
                    else "",
                    "pairs": _map(
                        np.array(pairs["pairs"]),
                        "plan",
                        f"{name}-p",
                        f"Divergence of plans: {where}",
                        pairs["bound"],
                        2,
                    )
                    if pairs
                    else "",
                    "moves": _map(
                        np.array(stated["chain"]["moves"]), "next plan", f"{name}-m", f"Moves: {where}", 1.0, 2
                    ),
                }
            )
    return found


def palette(plans: int) -> list[str]:
    """A colour for every plan."""
    if plans <= len(COLOURS):
        return list(COLOURS[:plans])
    return [f"hsl({360 * k // plans} 62% {42 + 10 * (k % 2)}%)" for k in range(plans)]


def _words(excerpt: dict[str, Any], colours: list[str]) -> list[dict[str, Any]]:
    """The tokens of an excerpt with the plan that each is put down to, and how surely."""
    begins, found = set(excerpt["starts"]), []
    for place, (token, credit) in enumerate(zip(excerpt["tokens"], excerpt["credit"], strict=True)):
        best = int(np.argmax(credit))
        found.append(
            {"text": token, "plan": best, "share": credit[best], "colour": colours[best], "ends": place in begins}
        )
    return found


def _map(table: np.ndarray, label: str, name: str, title: str, most: float = 1.0, digits: int = 0) -> str:
    """Rows are plans. digits: of the numbers in the boxes; 0 = none are written."""
    colours = LinearSegmentedColormap.from_list("plans", ("#edf1f4", "#8fb3cf", "#0f4c7a"))
    rows, columns = table.shape
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH if digits else 2 * WIDTH, 0.75 + 0.26 * rows))
        axes = figure.subplots()
        axes.pcolormesh(table, cmap=colours, vmin=0, vmax=most, edgecolors=PAPER, linewidth=1.0)
        for (row, column), value in np.ndenumerate(table) if digits else ():
            ink = "#ffffff" if value > 0.6 * most else "#1d2733"
            text = f"{value:.{digits}f}"
            axes.text(column + 0.5, row + 0.5, text, color=ink, ha="center", va="center", fontsize=7)
        some = np.arange(0, columns, max(1, -(-columns // 20)))
        axes.set_xticks(some + 0.5, [str(place) for place in some])
        axes.set_yticks(np.arange(rows) + 0.5, [str(row) for row in range(rows)], color=INK)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.set_xlabel(label)
        axes.set_ylabel("plan")
        return svg(figure, name, title)
