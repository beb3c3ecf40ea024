"""Commands on data: data compgen, data clrs, data fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stepladder import plugins
from stepladder.cli.options import Plugins
from stepladder.cli.terminal import listed, progress, say

app = typer.Typer(help="Make and check data sets.", no_args_is_help=True)
compgen = typer.Typer(help="CompGen: small programs with a declared complexity.", no_args_is_help=True)
clrs = typer.Typer(help="CLRS-Text: 30 textbook algorithms as questions and answers.", no_args_is_help=True)
app.add_typer(compgen, name="compgen")
app.add_typer(clrs, name="clrs")


@app.command()
def fetch(
    key: Annotated[str, typer.Argument(help="corpus, such as tinystories")],
    fields: Annotated[list[str] | None, typer.Argument(help="such as documents=20000", show_default=False)] = None,
) -> None:
    """Take a published corpus into the cache, as a run with a source {kind: corpus, key: KEY} does when it begins."""
    from stepladder.core.config import override, validate
    from stepladder.data import published
    from stepladder.run import cache_folder

    source = validate(published.CorpusSource, override({"key": key}, fields or ()), f"corpus {key}")
    with progress(f"taking {key}", (source.documents or 0) + (source.valid_documents or 0)) as advance:
        found = source.corpus(cache_folder(), advance).origin
    counts = ", ".join(f"{found[split]['documents']:,} documents {use}" for split, use in published.USES.items())
    say(f"{key} ({found.get('revision') or found['file']}): {counts}, in {cache_folder()}")


@compgen.command(name="generate")
def compgen_generate(
    out_dir: Annotated[Path, typer.Option(help="folder to make")],
    tasks: Annotated[str, typer.Option(help="tasks, comma-separated, or all")] = "all",
    dataset_size: Annotated[int, typer.Option(help="train and test examples of each task together")] = 10_000,
    seed: Annotated[int, typer.Option(help="seed of the examples and their order")] = 1337,
    min_n: Annotated[int, typer.Option(help="shortest array in train and test")] = 8,
    max_n: Annotated[int, typer.Option(help="longest array in train and test")] = 64,
    split_frac: Annotated[float, typer.Option(help="share of the examples that is for training")] = 0.98,
    ood_n: Annotated[int, typer.Option(help="longest array in ood; 0: no ood split")] = 128,
    ood_value: Annotated[int, typer.Option(help="largest number, up or down, in value_ood; 0: no such split")] = 500,
    ood_shift: Annotated[int, typer.Option(help="places to move letters on in alphabet_ood; 0: no such split")] = 13,
    fmt: Annotated[str, typer.Option(help="jsonl or parquet")] = "jsonl",
    hf_repo: Annotated[str | None, typer.Option(help="dataset on the Hugging Face hub, OWNER/NAME")] = None,
    hf_upload: Annotated[bool, typer.Option(help="upload to --hf-repo")] = False,
    hf_private: Annotated[bool, typer.Option(help="make a new --hf-repo private")] = False,
    plugin: Plugins = None,
) -> None:
    """Write train, test and out-of-distribution splits (length, values, letters) with a card; upload them, if asked."""
    plugins.load(plugin or ())
    from stepladder.data import compgen as programs
    from stepladder.data import hub

    repo = hub.asked(hf_repo, hf_upload)
    tree: dict[str, Any] = {"tasks": listed(tasks), "dataset_size": dataset_size, "seed": seed, "fmt": fmt}
    tree |= {"min_n": min_n, "max_n": max_n, "split_frac": split_frac, "ood_n": ood_n}
    tree |= {"ood_value": ood_value, "ood_shift": ood_shift}
    with progress(f"writing {out_dir}", programs.total(tree)) as advance:
        meta = programs.generate(tree, out_dir, advance)
    counts = ", ".join(f"{split['examples']:,} {name}" for name, split in meta["splits"].items())
    say(f"{out_dir}: {counts}, {len(meta['tasks'])} tasks")
    if repo:
        say(f"uploaded: {hub.upload(out_dir, repo, hf_private)}")


@compgen.command(name="verify")
def compgen_verify(
    folder: Annotated[Path, typer.Argument(help="folder that `generate` made")],
    every: Annotated[int, typer.Option(min=1, help="work out every so many'th answer")] = 1,
    plugin: Plugins = None,
) -> None:
    """Check files, splits and duplicates, and work out all answers anew."""
    plugins.load(plugin or ())
    from stepladder.data import compgen as programs

    with progress(f"checking {folder}", programs.count(folder)) as advance:
        found = programs.verify(folder, every, advance)
    say(f"{folder}: {', '.join(f'{count:,} {name}' for name, count in found.items())}: all as they should be")


@clrs.command(name="generate")
def clrs_generate(
    out: Annotated[Path, typer.Option(help="file to make, .jsonl or .jsonl.gz")],
    algorithms: Annotated[str, typer.Option(help="algorithms, comma-separated, or all")] = "all",
    lengths: Annotated[str, typer.Option(help="published lengths: train or eval; or some, comma-separated")] = "train",
    per_cell: Annotated[int, typer.Option(help="texts of each algorithm and length")] = 100,
    seed: Annotated[int, typer.Option(help="seed of the inputs")] = 0,
    hints: Annotated[bool, typer.Option(help="ask for the states on the way, too")] = False,
    max_chars: Annotated[int, typer.Option(help="characters of a text, at most")] = 8192,
    exclude: Annotated[list[Path] | None, typer.Option(help="file whose questions to leave out")] = None,
) -> None:
    """Write CLRS-Text, as question, answer, algo_name, length; no question twice."""
    from stepladder.data import clrs as textbook

    grid = lengths if lengths in ("train", "eval") else listed(lengths)
    tree: dict[str, Any] = {"algorithms": listed(algorithms), "lengths": grid, "per_cell": per_cell}
    tree |= {"seed": seed, "hints": hints, "max_chars": max_chars}
    with progress(f"writing {out}", textbook.total(tree)) as advance:
        made = textbook.generate(tree, out, exclude or (), advance)
    say(f"{out}: {textbook.told(made, per_cell)}")
