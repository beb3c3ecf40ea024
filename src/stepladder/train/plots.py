"""The two pictures of a run: its loss and its accuracies over steps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stepladder.core.files import write_atomic

Curve = list[tuple[int, float]]


def draw(run_dir: Path, lines: Sequence[Mapping[str, Any]], title: str) -> None:
    """Write loss.png (log scale) and, if there were evaluations with accuracies, accuracy.png from metric lines."""
    losses = [(line["step"], line["loss"]) for line in lines if (line.get("loss") or 0) > 0]
    _plot(run_dir / "loss.png", {"training": losses}, title, "loss (nats per supervised token)", "log")
    accuracies: dict[str, Curve] = {}
    for line in lines:
        for name, value in line.get("eval", {}).items():
            suite, _, what = name.partition("/")
            if suite in ("algorithmic", "vision") and value is not None:
                accuracies.setdefault(what, []).append((line["step"], value))
    if accuracies:
        _plot(run_dir / "accuracy.png", accuracies, title, "exact match", "linear")


def _plot(path: Path, curves: Mapping[str, Curve], title: str, quantity: str, scale: str) -> None:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, points in curves.items():
        steps, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, values, label=name, marker="." if len(points) < 30 else "")
    axes.set(title=title.replace("$", r"\$"), xlabel="step", ylabel=quantity)
    if scale == "linear":
        axes.set_ylim(-0.02, 1.02)
    elif any(curves.values()):
        axes.set_yscale(scale)
    if len(curves) > 1:
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    write_atomic(path, image.getvalue())
