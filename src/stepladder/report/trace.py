"""The page of a trace: what a model did, token by token and tick by tick, drawn from the files of one recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from safetensors import SafetensorError
from safetensors.numpy import load_file

from stepladder.core.errors import UserError
from stepladder.core.files import read_json, write_atomic
from stepladder.report import templates
from stepladder.report.figures import COLOURS, INK, LINE, MUTED, STYLE, svg
from stepladder.report.words import number

CAPTIONS = {
    "ticks": "Ticks executed for each token; of several parts, the most.",
    "nll": "Nats of the next token, given those up to here: high where the model was surprised.",
    "ponder": "Expected ticks.",
    "halt": "What the halting policy offered at each tick.",
    "behind": "Where the heads stand, in cells behind the own one (0): lines run from their start to their end, a dot.",
    "reads": "What the heads read at last: rows read columns, as in attention maps. Red weighs negative.",
    "random": "Share of the heads' weight that lay on random cells at last.",
    "angle": "Angle of each head behind the own cell, in radians: a band is a head, its rows are ticks.",
    "weight": "Weight of each head: a band is a head, its rows are ticks.",
    "write": "Size of what each tick wrote to a cell, its gate counted.",
    "read": "Size of what the heads read before each tick, and after the last.",
    "tape": "Norm of the whole tape before each tick, and after the last.",
    "belief": "Belief over plans (rows) after each token.",
    "plan": "Belief over plans at the start of each token's chunk, before one is sampled.",
    "forecast": "Belief over plans one chunk after each token's, as the chain alone foresees it.",
    "gate": "How far each tick was let through: 1/2 at first, 0 once the machine has halted; weights of plans.",
    "distance": "Distance of the control from its halting target, squared, a mean over channels.",
}
"""What is known of arrays by the last part of their name; of others the page tells the shape."""

COLOUR, DIVERGING = (
    LinearSegmentedColormap.from_list("trace", ("#edf1f4", "#8fb3cf", "#0f4c7a")),
    LinearSegmentedColormap.from_list("signed", ("#b0480a", "#f2c9ad", "#f3f3f1", "#8fb3cf", "#0f4c7a")),
)
FULL = 9.2  # inches
LABELS = 96  # tokens that can be told apart below a figure


def write(home: str | Path) -> Path:
    """Draw the recording in ``home`` (trace.safetensors, trace.json) into ``trace.html`` there; returns its path.

    Every array is drawn or, where it has too many axes, named. The same files give the same bytes.
    """
    home = Path(home)
    about = read_json(home / "trace.json")
    try:
        arrays = load_file(home / "trace.safetensors")
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{home / 'trace.safetensors'}: {error}; record it again with stepladder trace") from None
    if about.get("schema") != 1 or any(len(each) != len(about["tokens"]) for each in arrays.values()):
        raise UserError(f"{home}: trace.json and trace.safetensors do not belong together; record them again")
    nll, ticks = arrays["nll"][:-1], arrays.get("ticks")
    page = (
        templates.environment()
        .get_template("trace.html.jinja")
        .render(
            about=about,
            nll=number(float(nll.mean())),
            mean_ticks=None if ticks is None else number(float(ticks.mean()), 2),
            parts=_parts(arrays, about["tokens"]),
            missing=[f"{name} {shape(each)}" for name, each in arrays.items() if each.ndim > 3],
        )
    )
    write_atomic(home / "trace.html", page)
    return home / "trace.html"


def shape(array: np.ndarray) -> str:
    """(12, 5, 8) as ``12 × 5 × 8``."""
    return " × ".join(map(str, array.shape))


def _parts(arrays: dict[str, np.ndarray], tokens: list[str]) -> dict[str, list[dict[str, str]]]:
    """Figures by the part of the model that they are about: the whole model first, known ones before others."""
    found: dict[str, list[dict[str, str]]] = {}
    known = {name: place for place, name in enumerate(CAPTIONS)}

    def order(name: str) -> tuple[str, int, str]:
        part, _, what = name.rpartition(".")
        return part, known.get({"share": "reads"}.get(what, what), len(known)), what

    for name in sorted(arrays.keys() - {"token"}, key=order):
        part, _, what = name.rpartition(".")
        for title, drawn in _figures(what, part, arrays):
            panel = found.setdefault(part, [])
            full = f"{part}.{title}" if part else title
            with mpl.rc_context(STYLE):
                figure = drawn(tokens)
                drawing = svg(figure, f"{part or 'model'}-{len(panel)}", full)
            caption = CAPTIONS.get(title, " × ".join(["Tokens", *map(str, arrays[name].shape[1:])]))
            panel.append({"title": title, "caption": caption, "svg": drawing})
    return found


Draw = Callable[[list[str]], Figure]


def _figures(what: str, part: str, arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, Draw]]:
    """The figures of one array: by what it is, if that is known, else by its number of axes."""
    array = arrays[f"{part}.{what}" if part else what]
    if what == "cell":  # the numbers that "share" belongs to: drawn with it
        return
    if what == "share" and f"{part}.cell" in arrays:
        cell = arrays[f"{part}.cell"]
        yield "reads", lambda tokens: _reads(cell[:, -1], array[:, -1], tokens)
        if (cell < 0).any():
            yield "random", lambda tokens: _line(_random_share(cell[:, -1], array[:, -1]), tokens)
    elif what == "behind":
        yield what, lambda tokens: _tracks(array, tokens)
    elif array.ndim == 1:
        yield what, lambda tokens: _line(array, tokens)
    elif array.ndim <= 3:
        yield what, lambda tokens: _map(array, tokens)


def _line(values: np.ndarray, tokens: list[str]) -> Figure:
    """One number a token."""
    figure, axes = _canvas(1.7)
    axes.bar(np.arange(len(values)), np.nan_to_num(values), width=0.82, color=COLOURS[0], linewidth=0)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=values.dtype.kind in "iu"))
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    _tokens(axes, tokens)
    return figure


def _map(array: np.ndarray, tokens: list[str]) -> Figure:
    """Numbers of every token (columns): rows are the second axis; with a third one, a band of rows for each of it."""
    bands = array[:, :, None] if array.ndim == 2 else array.transpose(0, 2, 1)
    rows = bands.reshape(len(array), -1).T  # [bands x rows of a band, tokens]
    size = bands.shape[2] if array.ndim == 3 else 1
    height = float(np.clip(0.13 * len(rows), 1.0, 7.0))
    figure, axes = _canvas(0.7 + height)
    _image(figure, axes, rows)
    if array.ndim == 3:
        for edge in range(size, len(rows), size):
            axes.axhline(edge - 0.5, color=LINE, linewidth=0.8)
    count = bands.shape[1]
    some = np.arange(0, count, max(1, -(-count // 12)))
    axes.set_yticks(some * size + (size - 1) / 2, [str(place) for place in some])
    _tokens(axes, tokens)
    return figure


def _tracks(behind: np.ndarray, tokens: list[str]) -> Figure:
    """Heads (T, looks, heads) in cells behind the own one, from their start to their end."""
    figure, axes = _canvas(3.2)
    heads = behind.shape[2]
    for head in range(heads):
        colour = COLOURS[head % len(COLOURS)]
        place = np.arange(len(behind)) + (head - (heads - 1) / 2) * 0.7 / heads
        for before, after in pairwise(behind[:, :, head].T):
            moved = np.abs(after - before) < np.arange(1, len(behind) + 1) / 2  # else it went on at the other end
            axes.vlines(place[moved], before[moved], after[moved], color=colour, linewidth=0.9)
        axes.plot(place, behind[:, -1, head], "o", color=colour, markersize=2.4, markeredgewidth=0)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.invert_yaxis()
    axes.set_ylabel("cells behind")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    _tokens(axes, tokens)
    return figure


def _reads(cell: np.ndarray, share: np.ndarray, tokens: list[str]) -> Figure:
    """Addresses (T, A) as a map: who (rows) reads from whom (columns); random cells are left out."""
    count = len(cell)
    table = np.zeros((count, count))
    reader, place = np.nonzero((cell >= 0) & (cell < count))
    np.add.at(table, (reader, cell[reader, place]), share[reader, place])
    table[np.triu_indices(count, 1)] = np.nan
    side = float(np.clip(0.16 * count, 3.0, 8.0))
    figure, axes = _canvas(side, width=min(FULL, side + 1.2))
    _image(figure, axes, table)
    axes.set_aspect("equal")
    _tokens(axes, tokens)
    if count <= LABELS // 2:
        axes.set_yticks(np.arange(count), tokens, color=INK, fontsize=7)
    axes.set_xlabel("read from")
    axes.set_ylabel("reader")
    return figure


def _random_share(cell: np.ndarray, share: np.ndarray) -> np.ndarray:
    weight = np.abs(share)
    return np.where(cell < 0, weight, 0.0).sum(1) / np.maximum(weight.sum(1), 1e-12)


def _canvas(height: float, width: float = FULL) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _image(figure: Figure, axes: Axes, table: np.ndarray) -> None:
    """A map of colours with its bar: two-sided around 0 if there are negative numbers."""
    finite = table[np.isfinite(table)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    norm: Normalize
    if low < 0:
        reach = max(-low, high) or 1.0
        colours, norm = DIVERGING, TwoSlopeNorm(0, -reach, reach)
    else:
        colours, norm = COLOUR, Normalize(min(low, 0.0) if low < 0.5 * high else low, high if high > low else low + 1)
    drawn = axes.imshow(
        np.ma.masked_invalid(table), cmap=colours, norm=norm, aspect="auto", interpolation="none", rasterized=True
    )
    bar = figure.colorbar(drawn, ax=axes, pad=0.01, fraction=0.025, aspect=18)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(4)
    bar.update_ticks()
    axes.spines[:].set_visible(False)


def _tokens(axes: Axes, tokens: list[str]) -> None:
    """The tokens below, where they can be read, else their numbers."""
    axes.set_xlim(-0.5, len(tokens) - 0.5)
    if len(tokens) > LABELS:
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.set_xlabel("token")
        return
    long = max(map(len, tokens[1:])) > 2
    size = 8 if len(tokens) <= 64 else 6
    axes.set_xticks(np.arange(len(tokens)), tokens, color=INK, fontsize=size, rotation=90 if long else 0)
    if not long:
        axes.get_xticklabels()[0].set_rotation(90)
