"""The commands: parse, call, print. Whatever needs torch is imported inside its command, so that help is instant."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from stepladder.cli import architectures, data, ladders, runs
from stepladder.core.errors import UserError


class Group(TyperGroup):
    """Ctrl-C in any command is one word and exit status 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="stepladder",
    cls=Group,
    help="A laboratory for language models that take steps: laws admit architectures, evidence admits verdicts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (runs, ladders, architectures):
    app.add_typer(part.app)
app.add_typer(data.app, name="data")


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit status 2; an interrupted command exits with 130."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        typer.echo(f"error: {' '.join(named.split())}", err=True)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # torch has two kinds of its own for memory, both RuntimeErrors
        if (
            not isinstance(error, MemoryError)
            and "allocate memory" not in str(error)
            and "out of memory" not in str(error)
        ):
            raise
        typer.echo(
            "error: this needs more memory than there is; ask for less: a smaller size, batch or length", err=True
        )
        sys.exit(2)
