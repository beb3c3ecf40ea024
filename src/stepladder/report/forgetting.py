"""A page of what checkpoints know of texts: the forgetting matrix as a heat map, from results_forgetting.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from stepladder.core.errors import UserError
from stepladder.core.files import read_json, write_atomic
from stepladder.report import templates
from stepladder.report.figures import INK, PAPER, STYLE, WIDTH, svg
from stepladder.report.words import number

SCALE = 0.05
"""Bits per byte behind the best at which a cell is fully dark, at least: so that noise does not look like loss."""


def heat(results: dict[str, Any]) -> str:
    """Checkpoints (rows) by segments (columns), as one ``<svg>``.

    The number is bits per byte, the shade what is missing to the column's best; a frame marks who has just learned it.
    """
    table = np.array(results["matrix"], dtype=np.float64)
    worse = table - table.min(axis=0)
    colours = LinearSegmentedColormap.from_list("worse", ("#edf1f4", "#dba67e", "#8f3a08"))
    rows = [f"{place}: {each['run']}, step {each['step']}" for place, each in enumerate(results["checkpoints"])]
    columns = [each["name"] for each in results["segments"]]
    full = max(SCALE, float(worse.max()))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(WIDTH, 1.8 + 0.8 * len(columns)), 0.8 + 0.32 * len(rows)))
        axes = figure.subplots()
        axes.pcolormesh(worse, cmap=colours, vmin=0, vmax=full, edgecolors=PAPER, linewidth=1.5)
        for (row, column), value in np.ndenumerate(table):
            ink = "#ffffff" if worse[row, column] > 0.65 * full else "#1d2733"
            axes.text(column + 0.5, row + 0.5, f"{value:.3f}", color=ink, ha="center", va="center", fontsize=8)
        for column, each in enumerate(results["segments"]):
            if each["learned"] is not None:
                box = mpl.patches.Rectangle((column + 0.05, each["learned"] + 0.06), 0.9, 0.88, fill=False)
                box.set(edgecolor=INK, linewidth=1.2)
                axes.add_patch(box)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows, color=INK)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.set_xlabel("segment")
        return svg(figure, "forgetting", "Bits per byte of every segment, by checkpoint")


def write(home: str | Path) -> Path:
    """Draw the results in ``home`` into ``forgetting.html`` there; returns its path. Equal files give equal bytes."""
    home = Path(home)
    path = home / "results_forgetting.json"
    if not path.is_file():
        raise UserError(f"{home} has no results_forgetting.json; score the checkpoints first")
    results = read_json(path)
    columns = zip(results["segments"], zip(*results["matrix"], strict=True), results["forgetting"], strict=True)
    rows = [
        [each["name"], each["learned"], *(number(value) for value in (min(column), column[-1], lost))]
        for each, column, lost in columns
    ]
    back = results["backward_transfer"]
    page = (
        templates.environment()
        .get_template("forgetting.html.jinja")
        .render(
            heat=heat(results),
            rows=rows,
            mean=number(results["mean_forgetting"]),
            back=None if back is None else number(back),
            results=results,
        )
    )
    write_atomic(home / "forgetting.html", page)
    return home / "forgetting.html"
