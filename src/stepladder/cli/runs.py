"""Commands on one run: train, finetune, eval, sample, forgetting, trace, export."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepladder import plugins
from stepladder.cli.options import Overrides, Plugins, Runs, Ticks
from stepladder.cli.terminal import (
    listed,
    load,
    print_answers,
    print_plans,
    print_results,
    progress,
    say,
    write_answers,
)

if TYPE_CHECKING:
    from stepladder.run import Run

app = typer.Typer()
_planner = partial(typer.Option, rich_help_panel="Planner: of apelr_v1, apelr_v2")
_memory = partial(typer.Option, rich_help_panel="Memories that learn at test time: of titans_*, hope_*")


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
    memorize: Annotated[bool, _memory("--memorize", help="also score behind what memories made of a text")] = False,
    memorize_steps: Annotated[int | None, _memory(help="how many times a text is read")] = None,
    memorize_use_correct_answer: Annotated[
        bool, _memory("--memorize-use-correct-answer", help="feed answers for later items; with --memorize-no-reset")
    ] = False,
    memorize_no_reset: Annotated[bool, _memory("--memorize-no-reset", help="carry on from item to item")] = False,
    memorize_paths: Annotated[str | None, _memory(help="which memories learn, comma-separated; default: all")] = None,
    memorize_surprise_threshold: Annotated[float | None, _memory(help="least nats a token of what is read")] = None,
    plugin: Plugins = None,
) -> None:
    """Evaluate a trained run on suites; writes per-example records and results beside it."""
    loaded = load(run, plugin)
    from stepladder.core.config import override, validate
    from stepladder.eval import memorize as memorizing
    from stepladder.eval import suite
    from stepladder.run import EvalConfig

    flags: dict[str, Any] = {"steps": memorize_steps, "use_correct_answer": memorize_use_correct_answer or None}
    flags |= {"reset": False if memorize_no_reset else None, "paths": listed(memorize_paths) or None}
    switched = memorizing.switches(memorize, {**flags, "surprise": memorize_surprise_threshold})
    tree = override(loaded.run.eval.model_dump(mode="json"), [*switched, *(overrides or [])])
    only = {} if tasks is None else {"tasks": listed(tasks) or (tasks,)}
    config = validate(EvalConfig, {**tree, **only}, "eval")
    results = suite.evaluate(loaded, listed(suites) or config.suites, run, config)
    print_results(results, quiet=False)
    if any(result.get("status") == "failed" for result in results):
        raise typer.Exit(1)


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="directory of a run")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="prompts to continue")] = None,
    prompts: Annotated[Path | None, typer.Option(help=".txt, or .jsonl with options of its own a line")] = None,
    max_new: Annotated[int, typer.Option(min=1, help="longest continuation in tokens")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 = greedy")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="sample among the k likeliest")] = None,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="sample within this mass")] = 1.0,
    seed: Annotated[int, typer.Option(help="key of the sampling")] = 0,
    ticks: Ticks = None,
    show_ticks: Annotated[bool, typer.Option("--show-ticks", help="colour tokens by the ticks they took")] = False,
    html: Annotated[Path | None, typer.Option(help="page with tokens coloured by the ticks they took")] = None,
    out: Annotated[Path | None, typer.Option(help="file for all there is to know, as JSON lines")] = None,
    force_state: Annotated[int | None, _planner(help="one plan, exactly its expert")] = None,
    freeze_planner: Annotated[bool, _planner("--freeze-planner", help="the belief stays the prior")] = False,
    lookahead_steps: Annotated[int | None, _planner(help="chunks of the forecast; 0 = none")] = None,
    lookahead_feedback_scale: Annotated[float | None, _planner(help="share of the forecast in the gate")] = None,
    planner_temperature: Annotated[float | None, _planner(help="of the gate")] = None,
    token_filtering: Annotated[
        bool | None, _planner("--token-filtering/--no-token-filtering", help="whether tokens are evidence")
    ] = None,
    plans: Annotated[bool, _planner("--plans", help="show the belief chunk by chunk, and what it foresaw")] = False,
    plugin: Plugins = None,
) -> None:
    """Continue prompts with a trained run."""
    loaded = load(run, plugin)
    from stepladder.eval.prompts import answers, read
    from stepladder.eval.steering import steered

    options: dict[str, Any] = {"max_new": max_new, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    steer: dict[str, Any] = {"lookahead_feedback_scale": lookahead_feedback_scale, "token_filtering": token_filtering}
    steer |= {"planner_temperature": planner_temperature, "lookahead_steps": lookahead_steps}
    with steered(loaded.model, force_state=force_state, freeze_planner=freeze_planner, **steer):
        found = answers(loaded, read(texts or (), prompts, {**options, "seed": seed, "ticks": ticks}))
        print_answers(found, show_ticks)
        print_plans(loaded, found if plans else ())
    write_answers(loaded, found, html, out)


@app.command()
def forgetting(
    checkpoints: Annotated[list[Path], typer.Argument(help="oldest first: runs/NAME, or runs/NAME/checkpoints/STEP")],
    segments: Annotated[Path, typer.Option(help="YAML file that names the texts in the order they were learned")],
    out: Annotated[Path, typer.Option(help="directory for results, records and page")] = Path("forgetting"),
    plugin: Plugins = None,
) -> None:
    """Score texts by checkpoints of continual training: what is forgotten, what is carried back, as a heat map."""
    plugins.load(plugin or ())
    from stepladder.eval.forgetting import forgetting as score
    from stepladder.report.forgetting import write

    with progress(f"scoring {len(checkpoints)} checkpoints", 1) as advance:
        score(checkpoints, segments, out, advance=advance)
    say(f"page: {write(out)}")


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
def export(
    run: Annotated[Path, typer.Argument(help="directory of a run")],
    onnx: Annotated[Path, typer.Option(help="file for one decode step with explicit state")],
    batch: Annotated[int, typer.Option(min=1, help="sequences at a time")] = 1,
    capacity: Annotated[int, typer.Option(min=1, help="tokens that a state can hold")] = 1024,
    ticks: Ticks = None,
    plugin: Plugins = None,
) -> None:
    """Write a trained run's decode step as ONNX."""
    loaded = load(run, plugin)
    from stepladder.export import onnx as exporter

    exporter.export(loaded.run.model, loaded.model, onnx, batch=batch, capacity=capacity, ticks=ticks)
    say(f"written: {onnx}, {exporter.start_of(onnx)}, {onnx}.json")


def _carry_out(run: Run, runs: Path, extend: bool, evaluate: bool, quiet: bool) -> None:
    """Train a run, then evaluate it."""
    from stepladder.eval import suite
    from stepladder.run import load
    from stepladder.train import session

    home = session.train(run, runs, evaluate=suite.quick, rehearse=suite.check, extend=extend, quiet=quiet)
    if evaluate and not suite.done(home, run):
        print_results(suite.evaluate(load(home), run.eval.suites, home, quiet=quiet), quiet)
    say(f"run: {home}")
