"""The commands: parse, call, print. Whatever needs torch is imported inside its command, so that help is instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.segment import Segment, Segments
from rich.style import Style
from typer.core import TyperGroup

from stepladder import plugins
from stepladder.core.errors import UserError
from stepladder.terminal import (
    console,
    hold,
    listed,
    load,
    print_results,
    print_rows,
    print_sweep,
    print_verdict,
    progress,
    say,
)

if TYPE_CHECKING:
    from stepladder.run import Run


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
Overrides = Annotated[list[str] | None, typer.Argument(help="path=value, such as model.width=256", show_default=False)]
LadderOverrides = Annotated[
    list[str] | None, typer.Argument(help="path=value, such as run.train.steps=500", show_default=False)
]
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", help="Python file that registers architectures, tasks, suites")
]
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
    alg_tokens: Annotated[float | None, typer.Option(help="curriculum: tokens of tasks first, such as 2e6")] = None,
    total_tokens: Annotated[float | None, typer.Option(help="curriculum: all tokens, then --text [pydoc]")] = None,
    alg_tasks: Annotated[str | None, typer.Option(help="curriculum: tasks, comma-separated; default: all")] = None,
    name: Annotated[str | None, typer.Option(help="name of the run")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of the run")] = None,
    runs: Runs = Path("runs"),
    extend: Annotated[bool, typer.Option(help="go on with a larger budget, at the final learning rate")] = False,
    use_muon: Annotated[bool, typer.Option("--use-muon", help="Muon for hidden matrices")] = False,
    muon_lr: Annotated[float | None, typer.Option(help="Muon's learning rate [0.02]")] = None,
    aux_adam_lr: Annotated[float | None, typer.Option(help="learning rate of AdamW beside it: train.lr")] = None,
    freeze_encoder: Annotated[bool, typer.Option("--freeze-encoder", help="do not train the image encoder")] = False,
    evaluate: Annotated[bool, typer.Option(help="run the evaluation suites at the end")] = True,
    quiet: Annotated[bool, typer.Option(help="no progress")] = False,
    plugin: Plugins = None,
) -> None:
    """Train one run, then evaluate it. Interrupted, it goes on from its last checkpoint."""
    plugins.load(plugin or ())
    from stepladder import run as running

    flags: dict[str, Any] = {"model": model, "text": text, "steps": steps}
    flags |= {"tasks": ",".join(listed(tasks)) or tasks, "alg_tasks": ",".join(listed(alg_tasks)) or alg_tasks}
    flags |= {"alg_tokens": alg_tokens, "total_tokens": total_tokens}
    switched = running.switches(use_muon, muon_lr, aux_adam_lr, freeze_encoder)
    run = running.read(config, [*switched, *(overrides or [])], flags, name=name, seed=seed)
    _carry_out(run, runs, extend, evaluate, quiet)


@app.command()
def finetune(
    base: Annotated[Path, typer.Argument(help="directory of the run to start from")],
    config: Annotated[Path | None, typer.Argument(help="file with data, train, eval", show_default=False)] = None,
    overrides: Overrides = None,
    adapters: Annotated[int | None, typer.Option(min=1, help="train low-rank adapters of this rank")] = None,
    full: Annotated[bool, typer.Option("--full", help="train all weights")] = False,
    alpha: Annotated[float | None, typer.Option(help="scale of adapters, times rank; default: 2 x rank")] = None,
    vocabulary: Annotated[bool, typer.Option("--vocabulary", help="beside adapters, embeddings and head")] = False,
    tasks: Annotated[str | None, typer.Option(help="tasks, comma-separated, in place of a file")] = None,
    text: Annotated[str | None, typer.Option(help="text or jsonl(.gz) file, in place of a file")] = None,
    steps: Annotated[int | None, typer.Option(help="training steps, in place of a file")] = None,
    name: Annotated[str | None, typer.Option(help="name of the run; default: BASE-finetuned")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of the run")] = None,
    runs: Runs = Path("runs"),
    evaluate: Annotated[bool, typer.Option(help="run the evaluation suites at the end")] = True,
    quiet: Annotated[bool, typer.Option(help="no progress")] = False,
    plugin: Plugins = None,
) -> None:
    """Train a run's model further on other data, from step 0: low-rank adapters, or all its weights."""
    plugins.load(plugin or ())
    from stepladder import finetune as tuning

    stage = tuning.stage(adapters, full, alpha, vocabulary)
    flags: dict[str, Any] = {"tasks": ",".join(listed(tasks)) or tasks, "text": text, "steps": steps}
    run = tuning.read(base, config, overrides or [], flags, stage, name=name, seed=seed)
    _carry_out(run, runs, False, evaluate, quiet)


@app.command(name="eval")
def evaluate_run(
    run: Annotated[Path, typer.Argument(help="directory of a run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="such as samples=1000", show_default=False)] = None,
    suites: Annotated[str | None, typer.Option("--suite", help="comma-separated suites, or all")] = None,
    tasks: Annotated[str | None, typer.Option(help="only these tasks of the run, comma-separated")] = None,
    plugin: Plugins = None,
) -> None:
    """Evaluate a trained run on suites; writes per-example records and results beside it."""
    loaded = load(run, plugin)
    from stepladder.core.config import override, validate
    from stepladder.eval import suite
    from stepladder.run import EvalConfig

    tree = override(loaded.run.eval.model_dump(mode="json"), overrides or [])
    only = {} if tasks is None else {"tasks": listed(tasks) or (tasks,)}
    config = validate(EvalConfig, {**tree, **only}, "eval")
    results = suite.evaluate(loaded, listed(suites) or config.suites, run, config)
    print_results(results, quiet=False)
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
    loaded = load(run, plugin)
    from stepladder.eval.decode import continue_texts

    options: dict[str, Any] = {"max_new": max_new, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    texts = continue_texts(loaded, prompts, key=seed, ticks=ticks, **options)
    for prompt, found in zip(prompts, texts, strict=True):
        # Segments go out as they are: no wrapping, no markup, no emoji, tabs stay tabs.
        parts = [
            Segment(prompt, Style(bold=True)),
            Segment(found.text),
            Segment(f"  ({found.stop})\n", Style(dim=True)),
        ]
        console.print(Segments(parts), soft_wrap=True, end="")


@app.command()
def trace(
    run: Annotated[Path, typer.Argument(help="directory of a run")],
    text: Annotated[str, typer.Option(help="text to run through the model")],
    ticks: Ticks = None,
    seed: Annotated[int, typer.Option(help="key of stochastic parts")] = 0,
    out: Annotated[Path | None, typer.Option(help="directory for the files; default: RUN/trace")] = None,
    plugin: Plugins = None,
) -> None:
    """Show what a trained run does on a text, token by token and tick by tick: arrays and a page of figures."""
    loaded = load(run, plugin)
    from stepladder.eval.trace import record
    from stepladder.report.trace import write

    home = record(loaded, text, out or run / "trace", ticks=ticks, key=seed)
    say(f"page: {write(home)}")


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


data_app = typer.Typer(help="Make and check data sets.", no_args_is_help=True)
compgen_app = typer.Typer(help="CompGen: small programs with a declared complexity.", no_args_is_help=True)
clrs_app = typer.Typer(help="CLRS-Text: 30 textbook algorithms as questions and answers.", no_args_is_help=True)
app.add_typer(data_app, name="data")
data_app.add_typer(compgen_app, name="compgen")
data_app.add_typer(clrs_app, name="clrs")


@compgen_app.command(name="generate")
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
    from stepladder.data import compgen, hub

    repo = hub.asked(hf_repo, hf_upload)
    tree: dict[str, Any] = {"tasks": listed(tasks), "dataset_size": dataset_size, "seed": seed, "fmt": fmt}
    tree |= {"min_n": min_n, "max_n": max_n, "split_frac": split_frac, "ood_n": ood_n}
    tree |= {"ood_value": ood_value, "ood_shift": ood_shift}
    with progress(f"writing {out_dir}", compgen.total(tree)) as advance:
        meta = compgen.generate(tree, out_dir, advance)
    counts = ", ".join(f"{split['examples']:,} {name}" for name, split in meta["splits"].items())
    say(f"{out_dir}: {counts}, {len(meta['tasks'])} tasks")
    if repo:
        say(f"uploaded: {hub.upload(out_dir, repo, hf_private)}")


@compgen_app.command(name="verify")
def compgen_verify(
    folder: Annotated[Path, typer.Argument(help="folder that `generate` made")],
    every: Annotated[int, typer.Option(min=1, help="work out every so many'th answer")] = 1,
    plugin: Plugins = None,
) -> None:
    """Check files, splits and duplicates, and work out all answers anew."""
    plugins.load(plugin or ())
    from stepladder.data import compgen

    with progress(f"checking {folder}", compgen.count(folder)) as advance:
        found = compgen.verify(folder, every, advance)
    say(f"{folder}: {', '.join(f'{count:,} {name}' for name, count in found.items())}: all as they should be")


@clrs_app.command(name="generate")
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
    from stepladder.data import clrs

    grid = lengths if lengths in ("train", "eval") else listed(lengths)
    tree: dict[str, Any] = {"algorithms": listed(algorithms), "lengths": grid, "per_cell": per_cell}
    tree |= {"seed": seed, "hints": hints, "max_chars": max_chars}
    with progress(f"writing {out}", clrs.total(tree)) as advance:
        made = clrs.generate(tree, out, exclude or (), advance)
    say(f"{out}: {clrs.told(made, per_cell)}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="architecture, or a part of a file: train, data, eval, ladder")],
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


def _carry_out(run: Run, runs: Path, extend: bool, evaluate: bool, quiet: bool) -> None:
    """Train a run, then evaluate it."""
    from stepladder.eval import suite
    from stepladder.run import load
    from stepladder.train import session

    home = session.train(run, runs, evaluate=suite.quick, rehearse=suite.check, extend=extend, quiet=quiet)
    if evaluate and not suite.done(home, run):
        print_results(suite.evaluate(load(home), run.eval.suites, home, quiet=quiet), quiet)
    say(f"run: {home}")


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


if __name__ == "__main__":
    main()
