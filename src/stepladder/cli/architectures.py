"""Commands on architectures and parts: list, show, draw, check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepladder import plugins
from stepladder.cli.options import Plugins, Ticks
from stepladder.cli.terminal import console, hold, listed, print_rows, say, write_svg
from stepladder.core.errors import UserError

app = typer.Typer()


@app.command(name="list")
def list_things(plugin: Plugins = None) -> None:
    """List architectures, image encoders, tasks, suites and laws."""
    plugins.load(plugin or ())
    from stepladder.data.tasks import TASKS
    from stepladder.eval.suite import SUITES
    from stepladder.laws import LAWS
    from stepladder.models.encoders import ENCODERS
    from stepladder.models.zoo import ARCHITECTURES

    for registry in (ARCHITECTURES, ENCODERS, TASKS, SUITES):
        rows = []
        for name in registry.names():
            line = (registry.get(name).__doc__ or "").strip().partition("\n")[0]
            complexity = getattr(registry.get(name), "complexity", None)
            rows.append((name, f"{line} {complexity}" if complexity else line))
        print_rows(registry.noun, rows)
    print_rows("law", [(name, law.says) for name, law in LAWS.items()])


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="architecture, or a part of a file: train, data, eval, ladder, sweep")],
    overrides: Annotated[list[str] | None, typer.Argument(help="fields, such as width=256", show_default=False)] = None,
    size: Annotated[str | None, typer.Option(help="named size")] = None,
    vocab: Annotated[int, typer.Option(min=4, help="vocabulary")] = 259,
    context: Annotated[str, typer.Option(help="context lengths, comma-separated")] = "128,1024,4096",
    batch: Annotated[int, typer.Option(min=1, help="sequences at a time")] = 1,
    precision: Annotated[str, typer.Option(help="of training: fp32 or bf16")] = "fp32",
    ticks: Ticks = None,
    plugin: Plugins = None,
) -> None:
    """Show an architecture's fields, costs and layers without allocating it, and the five hops of training."""
    plugins.load(plugin or ())
    from stepladder import show as showing
    from stepladder.cli.runs import train
    from stepladder.core.config import override
    from stepladder.experiments.match import sized

    if name in showing.SECTIONS:
        console.print(showing.fields(name, showing.SECTIONS[name]))
        return
    chosen = sized(name, size, vocab, **override({}, overrides or []))
    costs = showing.costs(chosen, vocab, context, batch, ticks, precision)  # first: a mistake prints nothing else
    for part in (showing.fields(chosen.kind, type(chosen)), costs, showing.layers(chosen, vocab, ticks)):
        console.print(part)
    say("\n".join(showing.hops(train)))


@app.command()
def draw(
    name: Annotated[str, typer.Argument(help="architecture")],
    overrides: Annotated[list[str] | None, typer.Argument(help="fields, such as width=256", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="file to write; default: NAME.svg")] = None,
    autograd: Annotated[bool, typer.Option("--autograd", help="the graph of a backward pass, at tiny size")] = False,
    size: Annotated[str | None, typer.Option(help="named size")] = None,
    vocab: Annotated[int, typer.Option(min=4, help="vocabulary")] = 259,
    context: Annotated[int, typer.Option(min=1, help="context length of the FLOPs")] = 1024,
    ticks: Ticks = None,
    plugin: Plugins = None,
) -> None:
    """Draw an architecture as SVG: its parts with shapes, parameters, FLOPs and loops; or its autograd graph."""
    plugins.load(plugin or ())
    from stepladder import diagram
    from stepladder.core.config import override
    from stepladder.experiments.match import sized

    chosen = sized(name, "tiny" if autograd and size is None else size, vocab, **override({}, overrides or []))
    write_svg(
        out or Path(f"{name}.svg"),
        diagram.autograd(chosen, ticks) if autograd else diagram.modules(chosen, vocab, context, ticks),
    )


@app.command()
def check(
    subject: Annotated[str, typer.Argument(help="architecture, or a Python file that registers some")],
    laws: Annotated[str | None, typer.Option("--laws", help="comma-separated laws; default: all")] = None,
    plugin: Plugins = None,
) -> None:
    """Check an architecture against the laws; exit status 1 if it breaks one."""
    plugins.load(plugin or ())
    names = plugins.load([subject]) if subject.endswith(".py") else [subject]
    if not names:
        raise UserError(f"{subject} registers no architecture; check is for architectures")
    from stepladder.laws import probe

    broken = False
    for name in names:
        say(name, bold=True)
        broken |= not hold(name, listed(laws))
        say(f"float32 against float64 over the full unroll: rounding amplified {probe(name):.3g} times")
    if broken:
        raise typer.Exit(1)
