"""Commands on many runs: climb, sweep, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepladder import plugins
from stepladder.cli.options import LadderOverrides, Plugins, Runs
from stepladder.cli.terminal import print_sweep, print_verdict, say

app = typer.Typer()


@app.command()
def climb(
    ladder: Annotated[Path, typer.Argument(help="ladder file")],
    overrides: LadderOverrides = None,
    text: Annotated[str | None, typer.Option(help="text or jsonl(.gz) file in place of the ladder's corpora")] = None,
    runs: Runs = Path("runs"),
    jobs: Annotated[int | None, typer.Option(min=1, help="runs at a time; default: cores / threads")] = None,
    plugin: Plugins = None,
) -> None:
    """Train and evaluate every rung of a ladder, judge it against its control, and write the page."""
    plugins.load(plugin or ())
    from stepladder import api

    files = tuple(plugin or ())
    page = api.climb(ladder, *(overrides or []), text=text, runs=runs, jobs=jobs, plugins=files, say=say)
    print_verdict(page)


@app.command()
def sweep(
    files: Annotated[list[str], typer.Argument(help="sweep files, then path=value, such as run.train.steps=500")],
    runs: Runs = Path("runs"),
    jobs: Annotated[int | None, typer.Option(min=1, help="runs at a time; default: cores / threads")] = None,
    export_wandb: Annotated[Path | None, typer.Option(help="write this W&B sweep file, and run nothing")] = None,
    plugin: Plugins = None,
) -> None:
    """Search for the best point of a run: grid, random draws or TPE. Given again, it goes on or joins in."""
    plugins.load(plugin or ())
    from stepladder.experiments.search import sweeps

    files_of, failed = tuple(plugin or ()), False
    for home, lost in sweeps(files, runs, jobs=jobs, plugins=files_of, wandb=export_wandb, say=say):
        print_sweep(home)
        failed |= bool(lost)
    if failed:
        raise typer.Exit(1)


@app.command()
def report(ladder: Annotated[Path, typer.Argument(help="directory of a climbed ladder, such as runs/first")]) -> None:
    """Judge a climbed ladder anew and write its page, Markdown and CSV from the files of its runs."""
    from stepladder.report.page import write

    print_verdict(write(ladder))
