"""Figures as inline SVG: deterministic bytes, text as text, colours that follow the page and colour-blind eyes.

Every function returns one ``<svg>`` element. Its ids carry the figure's own prefix, so that many live in one page;
its ink, grid and paper are CSS variables of the page (``--ink``, ``--muted``, ``--line``, ``--paper``), so that it is
readable on dark paper too.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from stepladder.report.evidence import Evidence, RunFiles
from stepladder.report.tables import one_line
from stepladder.report.words import MINUS, quantity

WIDTH = 4.6  # inches: 331 points, which a phone shows at their size
# Stand-ins that matplotlib draws with and the page replaces by its own variables.
INK, MUTED, LINE, PAPER = "#101112", "#717273", "#d1d2d3", "#fefdfc"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"}
# Okabe & Ito's colours (2008) without yellow, which paper swallows; the control is ink.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")
_MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"))
_POINTS = 200  # of a learning curve

STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "stepladder", "text.parse_math": False, "axes.unicode_minus": True,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 8.5, "axes.titlesize": 9.5,
    "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.labelsize": 8.5, "axes.edgecolor": LINE,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False, "axes.linewidth": 0.8,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "lines.linewidth": 1.6,
    "lines.markersize": 4.5, "figure.constrained_layout.use": True, "axes.titlelocation": "left",
}  # fmt: skip


class Style(NamedTuple):
    """How a rung looks wherever it is drawn."""

    colour: str
    marker: str
    glyph: str  # the marker as a letter, for legends in text
    line: str

    @property
    def css(self) -> str:
        """The colour as the page knows it."""
        return VARIABLES.get(self.colour, self.colour)


def styles(rungs: Sequence[str]) -> dict[str, Style]:
    """A style for every rung, the first (the control) in dashed ink; colours repeat after 7, with other lines."""
    found = {}
    for number, rung in enumerate(rungs):
        marker, glyph = _MARKERS[(number - 1) % len(_MARKERS)]
        line = ("-", ":", "-.")[((number - 1) // len(COLOURS)) % 3]
        found[rung] = Style(COLOURS[(number - 1) % len(COLOURS)], marker, glyph, line)
    return found | {rungs[0]: Style(INK, "o", "○", "--")}


def learning_curves(evidence: Evidence, look: dict[str, Style], name: str) -> str:
    """Training loss over tokens: the mean over seeds in a band from the lowest to the highest; failed runs thin."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2 * WIDTH, 3.2))
        axes = figure.subplots()
        top, bottom = -np.inf, np.inf
        for rung in evidence.rungs:
            curves = [run.curve for run in evidence.of(rung) if len(run.curve) > 1 and not run.failed]
            if curves:
                tokens, low, mean, high = _band(curves)
                axes.fill_between(tokens, low, high, color=look[rung].colour, alpha=0.15, linewidth=0)
                axes.plot(tokens, mean, color=look[rung].colour, linestyle=look[rung].line)
                top, bottom = max(top, high.max()), min(bottom, low.min())
        for run in (run for run in evidence.runs.values() if run.failed and len(run.curve)):
            _, tokens, loss = run.curve.T
            axes.plot(tokens, loss, color=look[run.rung].colour, linewidth=0.6, marker="x", markevery=[-1])
        if np.isfinite(top):
            pad = 0.05 * (top - bottom) or 0.1
            axes.set_ylim(bottom - pad, top + pad)  # a failed run may leave the frame: the others stay readable
        axes.set_xlabel("training tokens")
        axes.set_ylabel("loss, nats per token")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value).replace(" ", "")))
        _grid(axes, "y")
        return svg(figure, name, "Training loss of every rung over tokens")


def _band(curves: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Curves of one rung on common tokens: smoothed, then their lowest, mean and highest."""
    first, last = max(c[0, 1] for c in curves), min(c[-1, 1] for c in curves)
    tokens = np.linspace(first, max(first, last), _POINTS)
    rows = []
    for curve in curves:
        window = max(1, len(curve) // 50)
        total = np.convolve(curve[:, 2], np.ones(window), "same") / np.convolve(
            np.ones(len(curve)), np.ones(window), "same"
        )
        rows.append(np.interp(tokens, curve[:, 1], total))
    values = np.array(rows)
    return tokens, values.min(axis=0), values.mean(axis=0), values.max(axis=0)


def accuracy_by_size(evidence: Evidence, task: str, look: dict[str, Style], name: str) -> str:
    """Accuracy over problem size for one task, the training range shaded, chance dotted."""
    cells = sorted((cell for cell in evidence.cells if cell.task == task), key=lambda cell: cell.size)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9))
        axes = figure.subplots()
        sizes = [cell.size for cell in cells]
        if min(sizes) > 0 and max(sizes) >= 8 * min(sizes):
            axes.set_xscale("log")
        shown = [cell.size for cell in cells if cell.regime == "iid"]
        if shown:
            low, high = evidence.trained.get(task, (min(shown), max(shown)))
            axes.axvspan(low, high, color=MUTED, alpha=0.13, linewidth=0)
            axes.text(low, 1.03, " trained", color=MUTED, fontsize=7.5, va="bottom")
        complete = [run for run in evidence.runs.values() if run.complete]
        chance = [next((run.chance[cell] for run in complete if cell in run.chance), np.nan) for cell in cells]
        axes.plot(sizes, chance, color=MUTED, linewidth=1, linestyle=":")
        for rung in reversed(evidence.rungs):
            outcomes = _accuracies(evidence, rung, cells)
            if not outcomes.size:
                continue
            style = look[rung]
            axes.fill_between(
                sizes, outcomes.min(axis=0), outcomes.max(axis=0), color=style.colour, alpha=0.13, linewidth=0
            )
            face, edge = (PAPER, style.colour) if rung == evidence.control else (style.colour, PAPER)
            axes.plot(
                sizes, outcomes.mean(axis=0), color=style.colour, linestyle=style.line, marker=style.marker,
                markerfacecolor=face, markeredgecolor=edge, markeredgewidth=0.8,
            )  # fmt: skip
        axes.xaxis.set_major_locator(FixedLocator(_some(sizes)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.set_xlabel("size")
        _grid(axes, "y")
        return svg(figure, name, f"Accuracy over size: {task}")


def _accuracies(evidence: Evidence, rung: str, cells: Sequence[Any]) -> np.ndarray:
    """[seeds, cells] accuracies of the runs that ended; failed runs are 0."""
    ended = [run for run in evidence.of(rung) if not run.pending]
    return np.array([[run.correct[cell].mean() if run.complete else 0.0 for cell in cells] for run in ended])


def _some(values: list[int], most: int = 8) -> list[int]:
    return values if len(values) <= most else values[:: -(-len(values) // most)]


def heat_map(evidence: Evidence, task: str, name: str) -> str:
    """Mean accuracy of every rung at every size of one task; the line divides training sizes from those beyond."""
    cells = sorted((cell for cell in evidence.cells if cell.task == task), key=lambda cell: (cell.regime, cell.size))
    rows = [(rung, _accuracies(evidence, rung, cells)) for rung in evidence.rungs]
    rows = [(rung, values.mean(axis=0)) for rung, values in rows if values.size]
    divide = sum(cell.regime == "iid" for cell in cells)
    table = np.array([values for _, values in rows])
    labels = [str(cell.size) for cell in cells]
    return _heat(table, [rung for rung, _ in rows], labels, "size", name, f"Accuracy grid: {task}", divide)


def depth_map(runs: Sequence[RunFiles], task: str, name: str) -> str:
    """Mean accuracy over sizes (rows) and ticks in depth (columns), of one rung on one task."""
    found: dict[tuple[int, int], list[float]] = {}
    for run in runs:
        for cell in run.depth:
            if cell["task"] == task:
                found.setdefault((int(cell["size"]), int(cell["ticks"])), []).append(float(cell["accuracy"]))
    sizes, ticks = (sorted({pair[axis] for pair in found}) for axis in (0, 1))
    table = np.array([[np.mean(found.get((size, tick), [np.nan])) for tick in ticks] for size in sizes])
    rows = [f"size {size}" for size in sizes]
    return _heat(table, rows, [str(tick) for tick in ticks], "ticks", name, f"Accuracy over size and ticks: {task}")


def _heat(
    table: np.ndarray, rows: list[str], columns: list[str], label: str, name: str, title: str, divide: int = 0
) -> str:
    colours = LinearSegmentedColormap.from_list("accuracy", ("#edf1f4", "#8fb3cf", "#0f4c7a"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(WIDTH, 1.4 + 0.5 * len(columns)), 0.75 + 0.3 * len(rows)))
        axes = figure.subplots()
        axes.pcolormesh(np.ma.masked_invalid(table), cmap=colours, vmin=0, vmax=1, edgecolors=PAPER, linewidth=1.5)
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                ink = "#ffffff" if value > 0.6 else "#1d2733"
                axes.text(
                    column + 0.5, row + 0.5, f"{100 * value:.0f}", color=ink, ha="center", va="center", fontsize=8
                )
        if 0 < divide < len(columns):
            axes.axvline(divide, color=INK, linewidth=1.2)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
        axes.set_yticks(np.arange(len(rows)) + 0.5, [_short(row) for row in rows], color=INK)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.set_xlabel(label)
        return svg(figure, name, title)


def head_gradients(evidence: Evidence, look: dict[str, Style], name: str) -> str:
    """Gradient norm of the halting heads over training tokens, a thin line a seed and their median; 0 is shown as 0."""
    drawn = [(rung, [run.head for run in evidence.of(rung) if len(run.head)]) for rung in evidence.rungs]
    norms = np.concatenate([curve[:, 2] for _, curves in drawn for curve in curves])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2 * WIDTH, 2.8))
        axes = figure.subplots()
        if norms.any():  # logarithmic, but with a place for 0: below the smallest norm that was met
            least = 10.0 ** np.floor(np.log10(norms[norms > 0].min()))
            axes.set_yscale("symlog", linthresh=least, linscale=0.5)
            axes.set_ylim(-0.15 * least, 2 * norms.max())
        for rung, curves in ((rung, curves) for rung, curves in drawn if curves):
            style = look[rung]
            for curve in curves:
                axes.plot(curve[:, 1], curve[:, 2], color=style.colour, linewidth=0.6, alpha=0.5)
            shared = min(map(len, curves))
            if len(curves) > 1 and shared > 1:
                middle = np.median([curve[:shared, 2] for curve in curves], axis=0)
                axes.plot(curves[0][:shared, 1], middle, color=style.colour, linestyle=style.line)
        axes.set_xlabel("training tokens")
        axes.set_ylabel("gradient norm")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value).replace(" ", "")))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", MINUS)))
        axes.yaxis.set_minor_locator(NullLocator())
        _grid(axes, "y")
        return svg(figure, name, "Gradient norm of the halting heads over training")


def tick_bars(shares: dict[str, dict[int, float]], budget: int, style: Style, name: str, title: str) -> str:
    """Share of answer tokens by executed ticks, 1 to ``budget``: full bars at training sizes, pale ones beyond."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.2))
        axes = figure.subplots()
        ticks = np.arange(1, budget + 1)
        width = 0.8 / max(1, len(shares))
        for number, regime in enumerate(sorted(shares)):  # iid, ood
            heights = [shares[regime].get(int(tick), 0.0) for tick in ticks]
            place = ticks - 0.4 + width * (number + 0.5)
            axes.bar(place, heights, width, color=style.colour, alpha=1.0 if regime == "iid" else 0.35, edgecolor=PAPER)
        axes.set_ylim(0, 1.02)
        axes.set_xlim(0.4, budget + 0.6)
        axes.xaxis.set_major_locator(FixedLocator(_some(ticks.tolist(), 16)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.set_xlabel("executed ticks")
        _grid(axes, "y")
        return svg(figure, name, title)


def standings(
    places: dict[str, dict[str, float]], rows: list[dict[str, Any]], look: dict[str, Style], name: str, title: str
) -> str:
    """Accuracy over mean ticks of all rungs on a task: those of fixed ticks joined, beside the others their exits.

    places: of every rung, see halting.standings. rows: one a rung that decides, see halting.exits.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.8))
        axes = figure.subplots()
        decides = {row["rung"] for row in rows}
        fixed = sorted((at["ticks"], 100 * at["accuracy"]) for rung, at in places.items() if rung not in decides)
        if fixed:
            axes.plot(*zip(*fixed, strict=True), color=MUTED, linestyle="--", linewidth=1)
        for row in rows:
            colour = look[row["rung"]].colour
            for key, ticks, marker, size, face in (
                ("random", "mean_ticks", "o", 12, "none"),
                ("oracle", "oracle_ticks", "*", 9, colour),
            ):
                place = (row[ticks], 100 * row[key])
                axes.plot(*place, marker=marker, markersize=size, color=face, markeredgecolor=colour)
        for rung, at in places.items():
            style = look[rung]
            face = PAPER if style.colour == INK else style.colour
            axes.plot([at["ticks"]] * 2, [100 * at["low"], 100 * at["high"]], color=style.colour, linewidth=0.8)
            place = (at["ticks"], 100 * at["accuracy"])
            axes.plot(*place, marker=style.marker, markersize=6.5, color=face, markeredgecolor=style.colour)
        axes.margins(0.08, 0.12)
        low, high = axes.get_ylim()
        pad = max(0.0, 10 - (high - low)) / 2  # of a difference of a point or two no mountain is made
        axes.set_ylim(low - pad, high + pad)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
        axes.set_xlabel("mean executed ticks")
        _grid(axes, "y")
        return svg(figure, name, title)


def exit_curve(row: dict[str, Any], fixed: dict[int, float], style: Style, name: str, title: str) -> str:
    """Accuracy over mean ticks: one budget for all (line), and the learned, random and oracle exits (points)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.2))
        axes = figure.subplots()
        axes.plot([*fixed], [*fixed.values()], color=MUTED, marker=".")
        for label, ticks, marker, face, edge, away, align in (
            ("oracle", row["oracle_ticks"], "*", MUTED, MUTED, (0, 9), "center"),
            ("random", row["mean_ticks"], style.marker, PAPER, style.colour, (6, -9), "left"),
            ("learned", row["mean_ticks"], style.marker, style.colour, style.colour, (-6, -9), "right"),
        ):
            axes.plot(ticks, row[label], marker=marker, markersize=7, color=face, markeredgecolor=edge)
            axes.annotate(
                label, (ticks, row[label]), xytext=away, textcoords="offset points", color=MUTED,
                va="center", ha=align,
            )  # fmt: skip
        axes.set_ylim(-0.05, 1.15)
        axes.set_xlim(1 - 0.17 * max(fixed), 1.25 * max(fixed))
        axes.xaxis.set_major_locator(FixedLocator(_some([*fixed], 16)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.set_xlabel("mean executed ticks")
        _grid(axes, "y")
        return svg(figure, name, title)


def forest(verdict: dict[str, Any], metric: str, look: dict[str, Style], name: str) -> str:
    """The differences of all rungs on one primary measure: interval, zero, and the margin of equivalence."""
    rows = [(r, c) for r, about in verdict["rungs"].items() for c in about["primary"] if c["metric"] == metric]
    rows = [(rung, c) for rung, c in rows if c["difference"] is not None]
    unit, margin = rows[0][1]["unit"], rows[0][1]["margin"]
    scale = 100 if unit == "accuracy" else 1
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.8 + 0.32 * len(rows)))
        axes = figure.subplots()
        axes.axvspan(-margin * scale, margin * scale, color=MUTED, alpha=0.13, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        limit = _limit([max(abs(c["low"] or 0), abs(c["high"] or 0), abs(c["difference"])) for _, c in rows], margin)
        for row, (rung, c) in enumerate(rows):
            _whisker(axes, row, c, look[rung], scale, limit)
        axes.set_yticks(range(len(rows)), [_short(rung) for rung, _ in rows], color=INK)
        axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(-limit * scale, limit * scale))
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda v, _: f"{v:+.4g}".replace("-", MINUS) if abs(v) > 1e-9 else "0")
        )
        axes.set_xlabel("points (more is better)" if unit == "accuracy" else "bits per byte (less is better)")
        _grid(axes, "x")
        return svg(figure, name, f"Differences from the control: {rows[0][1]['label']}")


def _limit(reach: list[float], margin: float) -> float:
    """Half the width of a forest: everything, unless a failed or hopeless rung would flatten all the others."""
    return 1.1 * max(2 * margin, min(max(reach), 4 * float(np.median(reach))))


def _whisker(axes: Axes, row: int, c: dict[str, Any], style: Style, scale: float, limit: float) -> None:
    """One rung of a forest; what lies outside the frame is a number at its edge."""
    if c["low"] is not None:
        axes.plot([c["low"] * scale, c["high"] * scale], [row, row], color=style.colour, solid_capstyle="butt")
    if abs(c["difference"]) > limit:
        side = np.sign(c["difference"])
        text = f"{c['difference'] * scale:+.3g}".replace("-", MINUS)
        axes.text(
            side * limit * scale, row - 0.3, f"{text} →" if side > 0 else f"← {text}", color=MUTED, fontsize=7.5,
            ha="right" if side > 0 else "left", va="center",
        )  # fmt: skip
        return
    judged = c["word"] not in ("not judged", "not matched", "no claim")
    axes.plot(
        c["difference"] * scale, row, marker=style.marker, markersize=6, color=style.colour,
        markerfacecolor=style.colour if judged else PAPER, markeredgecolor=style.colour,
    )  # fmt: skip


def _short(text: str, most: int = 18) -> str:
    text = one_line(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _grid(axes: Axes, axis: Any) -> None:
    axes.grid(axis=axis, color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)


def svg(figure: Figure, name: str, title: str) -> str:
    """The figure as one element, prefixed, titled, in the colours of the page, without date or prologue."""
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # measured with a stand-in, shown right
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href|href)="#', rf'\1="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, variable)
    width = figure.get_figwidth() * 72
    opening = (
        f'<svg role="img" aria-label="{html.escape(one_line(title))}" style="min-width:{0.95 * min(width, 720):.0f}px" '
    )
    text = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', lambda m: f"{opening}{m[1]}>", text, count=1, flags=re.DOTALL)
    return re.sub(r"\s*\n\s*", "\n", text).replace("xlink:href", "href").strip()
