"""The commands: parse, call, print. Whatever needs torch is imported inside its command, so that help is instant."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from stepladder.core.errors import UserError

app = typer.Typer(
    name="stepladder",
    help="A laboratory for language models that take steps: laws admit architectures, evidence admits verdicts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

Overrides = Annotated[list[str] | None, typer.Argument(help="path=value, such as model.width=256", show_default=False)]
Plugins = Annotated[list[str] | None, typer.Option("--plugin", help="Python file that registers architectures, tasks")]
Runs = Annotated[Path, typer.Option(help="directory that holds runs")]
Ticks = Annotated[int | None, typer.Option(min=1, help="tick budget of a loop; default: the architecture's own")]


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="run file (.yaml or .json)", show_default=False)] = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="architecture, in place of a run file")] = None,
    tasks: Annotated[str | None, typer.Option(help="tasks, comma-separated, in place of a run file")] = None,
    text: Annotated[str | None, typer.Option(help="text or jsonl(.gz) file, in place of a run file")] = None,
    steps: Annotated[int | None, typer.Option(help="training steps, in place of a run file")] = None,
    name: Annotated[str | None, typer.Option(help="name of the run")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of the run")] = None,
    runs: Runs = Path("runs"),
    extend: Annotated[bool, typer.Option(help="go on with a larger budget, at the final learning rate")] = False,
    evaluate: Annotated[bool, typer.Option(help="run the evaluation suites at the end")] = True,
    quiet: Annotated[bool, typer.Option(help="no progress")] = False,
    plugin: Plugins = None,
) -> None:
    """Train one run, then evaluate it. Interrupted, it goes on from its last checkpoint."""
    _plug(plugin)
    from stepladder import run as running
    from stepladder.eval import suite
    from stepladder.train import session

    flags = {"model": model, "tasks": tasks, "text": text, "steps": steps}
    run = running.read(config, overrides or [], flags, name=name, seed=seed)
    home = session.train(run, runs, evaluate=suite.quick, extend=extend, quiet=quiet)
    if evaluate:
        _print_results(suite.evaluate(running.load(home), run.eval.suites, home, quiet=quiet), quiet)
    console.print(f"run: {home}", highlight=False)


@app.command(name="eval")
def evaluate_run(
    run: Annotated[Path, typer.Argument(help="directory of a run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="such as samples=1000", show_default=False)] = None,
    suites: Annotated[str | None, typer.Option("--suite", help="comma-separated suites, or all")] = None,
    plugin: Plugins = None,
) -> None:
    """Evaluate a trained run on suites; writes per-example records and results beside it."""
    _plug(plugin)
    from stepladder import run as running
    from stepladder.core.config import override, validate
    from stepladder.eval import suite

    loaded = running.load(run)
    tree = override(loaded.run.eval.model_dump(mode="json"), overrides or [])
    config = validate(running.EvalConfig, tree, "eval")
    names = tuple(suites.split(",")) if suites else config.suites
    results = suite.evaluate(loaded, names, run, config)
    _print_results(results, quiet=False)
    if any(result.get("status") == "failed" for result in results):
        raise typer.Exit(1)


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="directory of a run")],
    prompts: Annotated[list[str], typer.Argument(help="prompts to continue")],
    max_new: Annotated[int, typer.Option(min=1, help="longest continuation in tokens")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 = greedy")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="sample among the k likeliest")] = None,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="sample within this mass")] = 1.0,
    seed: Annotated[int, typer.Option(help="key of the sampling")] = 0,
    ticks: Ticks = None,
    plugin: Plugins = None,
) -> None:
    """Continue prompts with a trained run."""
    _plug(plugin)
    from stepladder.eval.decode import continue_texts
    from stepladder.run import load

    options: dict[str, Any] = {"max_new": max_new, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    texts = continue_texts(load(run), prompts, key=seed, ticks=ticks, **options)
    for prompt, found in zip(prompts, texts, strict=True):
        console.print(f"[bold]{_plain(prompt)}[/bold]{_plain(found.text)}  [dim]({found.stop})[/dim]", highlight=False)


@app.command()
def climb(
    ladder: Annotated[Path, typer.Argument(help="ladder file")],
    overrides: Overrides = None,
    text: Annotated[str | None, typer.Option(help="text or jsonl(.gz) file in place of the ladder's corpora")] = None,
    runs: Runs = Path("runs"),
    jobs: Annotated[int | None, typer.Option(min=1, help="runs at a time; default: cores / threads")] = None,
    plugin: Plugins = None,
) -> None:
    """Train and evaluate every rung of a ladder, judge it against its control, and write the page."""
    _plug(plugin)
    from stepladder import api

    say = lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    page = api.climb(ladder, *(overrides or []), text=text, runs=runs, jobs=jobs, plugins=tuple(plugin or ()), say=say)
    _print_verdict(page)


@app.command()
def report(ladder: Annotated[Path, typer.Argument(help="directory of a climbed ladder, such as runs/first")]) -> None:
    """Judge a climbed ladder anew and write its page, Markdown and CSV from the files of its runs."""
    from stepladder.report.page import write

    _print_verdict(write(ladder))


@app.command()
def check(
    subject: Annotated[str, typer.Argument(help="architecture, or a Python file that registers some")],
    laws: Annotated[str | None, typer.Option("--laws", help="comma-separated laws; default: all")] = None,
    plugin: Plugins = None,
) -> None:
    """Check an architecture against the laws; exit status 1 if it breaks one."""
    names = _plug([subject]) if subject.endswith(".py") else [subject]
    _plug(plugin)
    from stepladder.laws import check as run_laws
    from stepladder.laws import probe

    broken = False
    for name in names:
        table = Table("law", "holds", "finding", "seconds", title=name)
        for finding in run_laws(name, only=tuple(laws.split(",")) if laws else None):
            mark = "[green]yes[/green]" if finding.passed else "[bold red]no[/bold red]"
            table.add_row(finding.law, mark, _plain(finding.detail), f"{finding.seconds:.1f}")
            broken |= not finding.passed
        console.print(table)
        console.print(f"float32 against float64 over the full unroll: rounding amplified {probe(name):.3g} times")
    if broken:
        raise typer.Exit(1)


@app.command(name="list")
def list_things(plugin: Plugins = None) -> None:
    """List architectures, tasks, suites and laws."""
    _plug(plugin)
    from stepladder.data.tasks import TASKS
    from stepladder.eval.suite import SUITES
    from stepladder.laws import LAWS
    from stepladder.models.zoo import ARCHITECTURES

    for registry in (ARCHITECTURES, TASKS, SUITES):
        rows = [(name, (registry.get(name).__doc__ or "").strip().partition("\n")[0]) for name in registry.names()]
        _print_rows(registry.noun, rows)
    _print_rows("law", [(name, law.says) for name, law in LAWS.items()])


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="architecture")],
    overrides: Annotated[list[str] | None, typer.Argument(help="fields, such as width=256", show_default=False)] = None,
    size: Annotated[str | None, typer.Option(help="named size")] = None,
    vocab: Annotated[int, typer.Option(min=4, help="vocabulary")] = 259,
    context: Annotated[str, typer.Option(help="context lengths, comma-separated")] = "128,1024,4096",
    batch: Annotated[int, typer.Option(min=1, help="sequences at a time")] = 1,
    ticks: Ticks = None,
    plugin: Plugins = None,
) -> None:
    """Show an architecture's costs and layers without allocating it, and the five hops of training."""
    _plug(plugin)
    from stepladder import show as showing
    from stepladder.core.config import override
    from stepladder.experiments.match import sized

    chosen = sized(name, size, vocab, **override({}, overrides or []))
    console.print(showing.costs(chosen, vocab, context, batch, ticks))
    console.print(showing.layers(chosen, vocab))
    console.print("\n".join(showing.hops(train)), highlight=False)


def _plug(files: list[str] | None) -> list[str]:
    """Import plugin files; returns the architectures that they registered."""
    if not files:
        return []
    from stepladder.models.zoo import ARCHITECTURES

    before = set(ARCHITECTURES.names())
    for file in files:
        path = Path(file)
        if not path.is_file():
            raise UserError(f"plugin '{file}' is not a file; give the path of a Python file")
        module_spec = importlib.util.spec_from_file_location(f"stepladder_plugin_{path.stem}", path)
        if module_spec is None or module_spec.loader is None:
            raise UserError(f"plugin '{file}' is not a Python file; its name must end in .py")
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module
        module_spec.loader.exec_module(module)
    return [name for name in ARCHITECTURES.names() if name not in before]


def _plain(text: str) -> str:
    """Text as it is: rich must not read markup into it."""
    return text.replace("[", "\\[")


def _print_rows(noun: str, rows: list[tuple[str, str]]) -> None:
    table = Table(noun, "what it is")
    for row in rows:
        table.add_row(*map(_plain, row))
    console.print(table)


def _print_results(results: list[dict[str, Any]], quiet: bool) -> None:
    if quiet:
        return
    from stepladder.eval.suite import tables

    for table in tables(results):
        console.print(table)


def _print_verdict(page: Path) -> None:
    markdown = page.with_suffix(".md")
    console.print(markdown.read_text(encoding="utf-8"), highlight=False, markup=False, soft_wrap=True)
    console.print(f"page: {page}", highlight=False)


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit status 2; an interrupted run exits with 143."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
