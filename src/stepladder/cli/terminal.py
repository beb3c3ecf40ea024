"""The terminal: what the commands print, and the few things that all of them ask of their words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table

from stepladder import plugins
from stepladder.core.errors import UserError

if TYPE_CHECKING:
    from stepladder.run import Loaded

console = Console()

_UNSEEN = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
"""Characters that a terminal would obey: models write those, too."""


def say(line: str, bold: bool = False) -> None:
    """A line as it is: nothing is wrapped, and nothing in it is markup."""
    console.print(line, style="bold" if bold else None, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal's stderr; gives a function that moves it on."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    shown = Console(stderr=True)
    bars = Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=shown, transient=True)
    bars.disable = not shown.is_terminal
    with bars:
        bar = bars.add_task(title, total=total)
        yield lambda count: bars.advance(bar, count)


def listed(given: str | None) -> tuple[str, ...]:
    """Comma-separated names, without the blanks around them."""
    return tuple(name.strip() for name in (given or "").split(",") if name.strip())


def load(run: Path, plugin: list[str] | None) -> Loaded:
    """The run, once its plugins have registered what it is made of."""
    plugins.load(plugin or ())
    from stepladder import run as running

    try:
        return running.load(run)
    except UserError as error:
        if plugin or not re.search("unknown (architecture|task)", str(error)):
            raise
        raise UserError(f"{error} (if a plugin registers it, give --plugin FILE)") from error


def hold(name: str, only: tuple[str, ...]) -> bool:
    """Print what every law says as soon as it has said it; returns whether all of them hold."""
    from stepladder.laws import LAWS
    from stepladder.laws import check as run_laws

    held = True
    # A law that does not exist comes first: it is refused before anything runs.
    for law in sorted(dict.fromkeys(only or LAWS), key=LAWS.__contains__):
        for finding in run_laws(name, only=(law,)):
            mark = "[green]yes[/green]" if finding.passed else "[bold red]no [/bold red]"
            detail = escape(" ".join(finding.detail.split()))
            line = f"  {finding.law:<13} {mark}  {detail}  [dim]{finding.seconds:.1f} s[/dim]"
            console.print(line, emoji=False, highlight=False, soft_wrap=True)
            held &= finding.passed
    return held


def print_rows(noun: str, rows: list[tuple[str, str]]) -> None:
    """A table of things by name."""
    table = Table(noun, "what it is")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def print_results(results: list[dict[str, Any]], quiet: bool) -> None:
    """The results of suites, each as its own table."""
    if quiet:
        return
    from stepladder.eval.suite import tables

    for table in tables(results):
        console.print(table)


def print_answers(answers: list[dict[str, Any]], ticks: bool) -> None:
    """Prompts and what they were continued with; with ``ticks``, token by token in the colours of their ticks.

    Where there are no colours, small figures behind the tokens tell the ticks.
    """
    from stepladder.report.samples import count, pieces, shades

    shade = {each: Style(color=s.ink, bgcolor=s.paper) for each, s in shades(answers).items()} if ticks else {}
    small = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
    parts: list[Segment] = [Segment("ticks ")] * bool(shade)
    parts += [Segment(f" {count(each)} ", style) for each, style in shade.items()] + [Segment("\n")] * bool(shade)
    for answer in answers:
        # Segments go out as they are: no wrapping, no markup, no emoji, tabs stay tabs.
        if not shade:
            parts.append(Segment(answer["prompt"].translate(_UNSEEN), Style(bold=True)))
            parts.append(Segment(answer["text"].translate(_UNSEEN)))
        for piece, spent, new in pieces(answer) if shade else ():
            told = "" if console.color_system or spent is None else count(spent).translate(small)
            style = shade.get(spent, Style()) if spent is not None else Style()
            parts.append(Segment(piece + told, style + Style(bold=new, underline=new)))
            parts += [Segment("\n")] * (piece == "⏎")
        parts.append(Segment(f"  ({answer['stop']})\n", Style(dim=True)))
    console.print(Segments(parts), soft_wrap=True, end="")


def print_plans(loaded: Loaded, answers: Sequence[dict[str, Any]]) -> None:
    """The belief of a planner over each answer, prompt included, chunk by chunk."""
    import numpy as np

    from stepladder.data.tokenizers import BOS
    from stepladder.eval.steering import snapshots

    for answer in answers:
        ids = loaded.tokenizer.encode(answer["prompt"] + answer["text"])
        console.print(snapshots(loaded, np.concatenate(([BOS], ids))))


def write_answers(loaded: Loaded, answers: list[dict[str, Any]], html: Path | None, lines: Path | None) -> None:
    """Write answers as a page of coloured tokens, as JSON lines, or both."""
    from stepladder.core.files import write_atomic
    from stepladder.report import samples

    about = {"run": loaded.run.name, "architecture": loaded.run.model.kind, "step": loaded.step}
    if lines is not None:
        write_atomic(lines, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
        say(f"answers: {lines}")
    if html is not None:
        say(f"page: {samples.write(answers, about, html)}")


def write_svg(file: Path, what: dict[str, Any]) -> None:
    """Write the drawing of ``stepladder.diagram``'s data."""
    from stepladder.core.files import write_atomic
    from stepladder.report import diagram

    write_atomic(file, diagram.autograd(what) if "edges" in what else diagram.modules(what))
    say(f"drawing: {file}")


def print_verdict(page: Path) -> None:
    """The verdicts beside a written page."""
    from stepladder.core.files import read_json
    from stepladder.report.tables import VERDICT_HEADER, verdict_rows

    verdict = read_json(page.with_name("verdict.json"))
    shown = (0, 1, 4, 5, 7)  # rung, measure, difference, interval, verdict
    table = Table(*(VERDICT_HEADER[column] for column in shown), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for row in verdict_rows(verdict):
        table.add_row(*(escape(row[column]) for column in shown))
    say(verdict["headline"])
    console.print(table)
    say(f"page: {page}")


def print_sweep(home: Path) -> None:
    """The points of a searched sweep, best first."""
    from stepladder.core.files import read_json
    from stepladder.report.sweep import headline, table

    found = read_json(home / "results.json")
    say(headline(found))
    console.print(table(found))
    say(f"results: {home / 'results.md'}")
