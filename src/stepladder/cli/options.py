"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="path=value, such as model.width=256", show_default=False)]
LadderOverrides = Annotated[
    list[str] | None, typer.Argument(help="path=value, such as run.train.steps=500", show_default=False)
]
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", help="Python file that registers architectures, tasks, suites")
]
Runs = Annotated[Path, typer.Option(help="directory that holds runs")]
Ticks = Annotated[int | None, typer.Option(min=1, help="tick budget of a loop; default: the architecture's own")]
