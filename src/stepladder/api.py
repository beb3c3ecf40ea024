"""The Python surface: five functions, each the same call that the command line makes."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from stepladder.core.errors import UserError
from stepladder.core.files import read_lines
from stepladder.core.keys import key
from stepladder.experiments import climb as climbing
from stepladder.experiments import ladder as ladders
from stepladder.experiments.match import sized
from stepladder.models.lm import LanguageModel
from stepladder.models.zoo import ARCHITECTURES
from stepladder.plugins import load as load_plugins
from stepladder.report import page
from stepladder.run import Loaded, cache_folder
from stepladder.run import load as load_run


def architectures() -> list[str]:
    """The names of all registered architectures."""
    return ARCHITECTURES.names()


def build(name: str, vocab: int, size: str | None = None, seed: int = 0, **fields: Any) -> LanguageModel:
    """A freshly initialised model: ``build("shared_loop", vocab=259, size="tiny", ticks=4)``.

    vocab: number of token ids. size: a named size ("tiny", "nano", ...) or None for the defaults. fields: any
    field of the architecture's specification. The same seed gives the same weights; global randomness is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "init").seed())
        return sized(name, size, vocab, **fields).build(vocab)


def load(run_dir: str | Path, plugins: Sequence[str | Path] = ()) -> Loaded:
    """A trained run: ``.model`` (in eval mode), ``.tokenizer``, ``.run`` and the ``.step`` of its checkpoint.

    plugins: files that register the architecture or tasks of the run, if they are not of the package.
    """
    load_plugins(plugins)
    return load_run(Path(run_dir))


def records(run_dir: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Every evaluated example of a run, by suite; edited or torn files are refused."""
    folder = Path(run_dir) / "records"
    if not folder.is_dir():
        raise UserError(f"{run_dir} has no records; evaluate it first: stepladder eval {run_dir}")
    return {path.stem: read_lines(path) for path in sorted(folder.glob("*.jsonl"))}


def climb(
    path: str | Path,
    *overrides: str,
    text: str | Path | None = None,
    runs: str | Path = "runs",
    jobs: int | None = None,
    plugins: Sequence[str | Path] = (),
    say: Callable[[str], None] = print,
) -> Path:
    """Climb a ladder file and return the path of its page.

    overrides: ``run.train.steps=500`` and the like. text: a text or jsonl(.gz) file in place of the ladder's
    corpora. jobs: runs at a time; default: CPU cores / threads per run. plugins: files that register architectures.
    Runs that failed, or could not be started, do not stop the others or the page; at the end they raise Failed, a
    SystemExit with status 1. SIGTERM and SIGINT end in SystemExit with 143 and 130 when all checkpoints are safe.
    """
    load_plugins(plugins)
    runs, files = Path(runs), tuple(map(str, plugins))
    ladder = ladders.read(Path(path), list(overrides), str(text) if text is not None else None)
    rungs = ladders.expand(ladder, cache_folder(), runs)
    for name, rung in rungs.items():
        say(
            f"{name:>16}  {rung.params:>11,} parameters ({rung.residual:+.2%})  "
            f"{rung.cost.flops:>12,.0f} FLOPs/token  {rung.factor}"
        )
    flags = [
        *(["--text", str(text)] if text is not None else []),
        *(["--runs", str(runs)] if runs != Path("runs") else []),
        *(word for file in files for word in ("--plugin", file)),
    ]
    command = shlex.join(["stepladder", "climb", str(path), *overrides, *flags])
    home, failed = climbing.climb(ladder, rungs, runs, jobs=jobs, plugins=files, command=command, say=say)
    written = page.write(home)
    if failed:
        which = f"{len(failed)} {'run has' if len(failed) == 1 else 'runs have'} no result ({', '.join(failed)})"
        say(f"{which}; the same command tries again; page: {written}")
        raise climbing.Failed(1)
    return written
