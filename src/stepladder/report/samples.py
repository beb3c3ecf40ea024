"""The page of samples: how long a model thought about each token, as colour. Drawn from plain records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stepladder.core.errors import UserError
from stepladder.core.files import write_atomic
from stepladder.report import templates
from stepladder.report.words import number

LIGHT, DARK = (0xE8, 0xEE, 0xF3), (0x0F, 0x4C, 0x7A)
"""Colours of the fewest and of the most ticks: those of the maps in a trace."""


class Shade(NamedTuple):
    """A colour behind text, and the one of the text on it, as #rrggbb."""

    paper: str
    ink: str


def shades(answers: Sequence[dict[str, Any]]) -> dict[float, Shade]:
    """A colour for every number of ticks that occurs, ascending; a model that reports no ticks is a UserError."""
    found = {ticks for answer in answers for ticks in answer["ticks"] or ()}
    if not found:
        raise UserError("the model reports no ticks, so there are none to show; leave --show-ticks and --html out")
    low, high = min(found), max(found)
    return {ticks: _shade((ticks - low) / ((high - low) or 1)) for ticks in sorted(found)}


def _shade(place: float) -> Shade:
    mixed = [round(light + (dark - light) * place) for light, dark in zip(LIGHT, DARK, strict=True)]
    return Shade("#" + "".join(f"{part:02x}" for part in mixed), "#ffffff" if place > 0.5 else "#17181b")


def pieces(answer: dict[str, Any]) -> list[tuple[str, float | None, bool]]:
    """(token, ticks that went into it, whether it was written by the model) from the first token of the prompt on."""
    ticks = answer["ticks"] or [None] * len(answer["tokens"])
    start = answer["prompt_tokens"]
    return [(piece, ticks[i], i >= start) for i, piece in enumerate(answer["tokens"])]


def count(ticks: float) -> str:
    """Ticks in figures: whole ones without a point."""
    return str(int(ticks)) if ticks == int(ticks) else number(ticks, 2)


def write(answers: Sequence[dict[str, Any]], about: dict[str, Any], file: str | Path) -> Path:
    """Write the page of ``answers`` (see ``eval.prompts.answers``) to ``file``; returns it.

    about: what the model is, by name. The same answers give the same bytes.
    """
    colours = shades(answers)
    rank: dict[float | None, int] = {ticks: place for place, ticks in enumerate(colours)}
    texts = []
    for answer in answers:
        marked = [(piece, rank.get(ticks), None if ticks is None else count(ticks), new)
                  for piece, ticks, new in pieces(answer)]  # fmt: skip
        new = [ticks for _, ticks, written in pieces(answer) if written and ticks is not None]
        texts.append({**answer, "pieces": marked, "mean": number(sum(new) / len(new), 2) if new else None})
    page = (
        templates.environment()
        .get_template("samples.html.jinja")
        .render(about=about, answers=texts, legend=[(count(ticks), shade) for ticks, shade in colours.items()])
    )
    write_atomic(file, page)
    return Path(file)
