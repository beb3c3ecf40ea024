"""A training session: from a Run to its directory. Checks everything first, then trains, resumes or finds it done."""

from __future__ import annotations

import fcntl
import math
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stepladder.core.errors import UserError
from stepladder.core.files import (
    append_line,
    read_json,
    read_lines,
    trim_lines,
    truncate_lines,
    write_atomic,
    write_json,
)
from stepladder.core.keys import key
from stepladder.core.redact import redact
from stepladder.data.stream import Stream
from stepladder.data.tokenizers import Tokenizer
from stepladder.models.adapters import LowRank
from stepladder.models.lm import LanguageModel
from stepladder.run import Run, TrainConfig, cache_folder, checkpoints
from stepladder.train import checkpoint, plots, provenance
from stepladder.train.display import Display
from stepladder.train.loop import Budget, Progress, Stop, fit
from stepladder.train.loss import objective
from stepladder.train.micro import Micro
from stepladder.train.optim import optimizer as make_optimizer
from stepladder.train.request import Asked, agree, finished, held
from stepladder.train.starting import base_of, set_out, tokenizer_of
from stepladder.train.step import tensors

Evaluate = Callable[[LanguageModel, Tokenizer, Run], Mapping[str, float]]


class Interrupted(SystemExit):
    """Training was asked to stop by a signal and its checkpoint is safe; left alone, it ends the process.

    ``code`` is 128 + the signal's number: 143 after SIGTERM, 130 after SIGINT. The same call again goes on.
    """


def train(
    run: Run,
    root: Path,
    *,
    evaluate: Evaluate | None = None,
    resume: bool = True,
    quiet: bool = False,
    extend: bool = False,
    rehearse: Callable[[Run], None] | None = None,
) -> Path:
    """Train ``run`` in ``root/<its name>`` and return that directory.

    A finished run (complete or diverged) is returned at once, an unfinished one goes on from its newest sound
    checkpoint, bit for bit as if it had never stopped (``resume=False``: an existing directory is an error). One of
    another configuration is refused; but with ``extend``, if only the budget grew, its run goes on to the new budget at
    its final learning rate. ``evaluate`` gives figures for metric lines; ``rehearse`` raises what the evaluation would
    fail on. Nothing is created before everything has been built and tried once. SIGTERM and SIGINT end in
    ``Interrupted``; a second one ends the process at once.
    """
    run_dir = Path(root) / run.name
    with _reaching(run_dir):
        asked = agree(run, run_dir, resume, extend)
        done = finished(run_dir, asked)
    if done:
        with _writing(run_dir):
            _configure(run_dir, asked.base)
        if not quiet:
            print(f"{run.name}: already done", file=sys.stderr)
        return run_dir
    run = asked.base
    device = pick_device(run.train)
    with torch_settings(run.train, device):
        base = base_of(run, begun=bool(checkpoints(run_dir)))
        stream = Stream(run.data, run.seed, cache_folder(), tokenizer_of(run, run_dir, base))
        micro = Micro.of(run, stream.tokenizer.vocab, run_dir, device)
        model = build(run, stream.tokenizer.vocab)
        stream.expand(body(model))
        # With adapters, too: the gradient of whole weights is made.
        flops = model.cost(run.data.sequence, images=stream.images_per_row()).train_flops
        set_out(model, run, base)
        model.to(device)
        optimizer = make_optimizer(model, run.train)
        _rehearse(run, model, stream, micro.at(0).at_once(run.train.batch), rehearse)
        tokens_per_step = run.train.batch * run.data.sequence
        budget = Budget.of(asked.train, tokens_per_step, flops)
        budget = replace(budget, horizon=Budget.of(run.train, tokens_per_step, flops).horizon)
        if run.train.compile:
            model.compile()
        with _locked(run_dir):
            with _writing(run_dir):
                progress = _open(run_dir, asked, stream, model, optimizer, device)
                micro.keep(run_dir, progress.step)
            display = Display(run.name, budget, progress, provenance.device_name(device), quiet)
            with _signals() as stop, display, _summarised(run_dir, asked, model, progress) as outcome:
                outcome["status"] = fit(
                    model,
                    optimizer,
                    stream,
                    run,
                    budget,
                    progress,
                    run_dir,
                    stop,
                    micro=micro,
                    evaluate=evaluate and (lambda: _figures(evaluate, model, stream.tokenizer, run)),
                    log=lambda line: _log(run_dir, line, display),
                )
    if outcome["status"] == "interrupted":
        print(f"stepladder: {run.name}: interrupted at step {progress.step}; its checkpoint is safe", file=sys.stderr)
        raise Interrupted(128 + stop.signal)
    return run_dir


# Before anything is written -----------------------------------------------------------------------------------------


def pick_device(train: TrainConfig) -> torch.device:
    """The device to train on; what it cannot do is a UserError."""
    gpu = torch.cuda.is_available()
    if train.device == "cuda" and not gpu:
        raise UserError("train.device is 'cuda' but PyTorch sees no GPU here; use 'cpu' or 'auto'")
    device = torch.device("cuda" if gpu and train.device != "cpu" else "cpu")
    if train.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("train.precision is 'bf16' and this GPU has none; use 'fp32'")
    if train.compile and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("train.compile needs a C++ compiler on a CPU and there is none; install g++ or leave it out")
    return device


def build(run: Run, vocab: int) -> LanguageModel:
    """The model of a run with its initial weights, a function of the run's seed; torch's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(run.seed, "init").seed())
        model = run.build(vocab).train()
        if run.train.freeze_encoder and model.vision is not None:
            model.vision.requires_grad_(False)
        return model


def body(model: LanguageModel) -> int:
    """Parameters but for the token embeddings and the head: what a ratio of tokens to parameters counts."""
    outside = {id(p): p.numel() for part in (model.embed, model.head) for p in part.parameters()}
    return sum(p.numel() for p in model.parameters()) - sum(outside.values())


@contextmanager
def torch_settings(train: TrainConfig, device: torch.device) -> Iterator[None]:
    """Threads, the precision of products and, on a CPU, algorithms that sum in one order; put back afterwards."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    try:
        if train.threads is not None:
            torch.set_num_threads(train.threads)
        if device.type == "cpu":
            torch.use_deterministic_algorithms(True)
            memory.fill_uninitialized_memory = False  # filling costs time and changes no result
        torch.set_float32_matmul_precision(train.matmul)
        torch.backends.cudnn.allow_tf32 = train.tf32
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
        memory.fill_uninitialized_memory = fill


def _rehearse(run: Run, model: LanguageModel, stream: Stream, rows: int, also: Callable[[Run], None] | None) -> None:
    """One batch forwards: what does not fit together (lengths, names of losses) shows before there is a directory."""
    if also:
        also(run)
    batch = stream.batch(0, np.arange(rows), run.train.batch)
    tokens, targets, documents, images = tensors(batch, model.embed.tokens.weight.device)
    shown = {} if images is None else {"images": images}
    with torch.no_grad():
        output = model(tokens, targets=targets, documents=documents, key=0, **shown)
        objective(output, targets, run.train.at(0).losses)


# The directory ------------------------------------------------------------------------------------------------------


@contextmanager
def _reaching(run_dir: Path) -> Iterator[None]:
    """A directory that cannot be made or entered is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{run_dir} cannot be used as the directory of a run ({error}); give a folder that can be written"
        ) from error


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Create the directory and hold it for this process; the lock dies with its holder, however that ends."""
    with _reaching(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run_dir} is being trained by another process; wait for it, or give another name"
            ) from None
        yield


def _open(
    run_dir: Path,
    asked: Asked,
    stream: Stream,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> Progress:
    """Lay the directory out, or take up what it holds; returns where training stands."""
    source = checkpoint.to_resume(run_dir)
    state = {"progress": {}} if source is None else checkpoint.restore(source, model, optimizer)
    if source is not None and state["run"] != asked.base.hash():
        raise UserError(f"{source} belongs to another run than {run_dir}/config.json; put it back where it came from")
    known = run_dir / "data.json"
    if known.exists() and read_json(known)["fingerprint"] != stream.fingerprint():
        raise UserError(
            f"the data of {run_dir} have changed since it began (texts, or the code of a task); "
            f"bring them back, or give the run another name"
        )
    _configure(run_dir, asked.base)
    if not known.exists():
        write_atomic(run_dir / "tokenizer.json", stream.tokenizer.to_json())
        seen = {name: found for name, found in (("images", stream.images()), ("origins", stream.origins)) if found}
        fingerprints = {"fingerprint": stream.fingerprint(), "tokenizer": stream.tokenizer.fingerprint}
        write_json(known, {**fingerprints, "overlap": stream.overlap(), **seen})
    if asked.extended:
        write_json(run_dir / "extension.json", asked.extended)
    progress = Progress(**state["progress"])
    metrics = run_dir / "metrics.jsonl"
    trim_lines(metrics)
    truncate_lines(metrics, lambda line: line["step"] <= progress.step)
    # A checkpoint is written before its step is evaluated: the lines know what was.
    lines = read_lines(metrics) if metrics.exists() else []
    progress.evaluated = max((line["step"] for line in lines if "eval" in line), default=0)
    (run_dir / "summary.json").unlink(missing_ok=True)  # until this session ends, the run is unfinished
    sessions = provenance.record(run_dir, device, progress.step)
    if sessions[0]["device"] != sessions[-1]["device"] and progress.step:
        print(
            f"stepladder: warning: {run_dir.name} began on {sessions[0]['device']} and goes on on "
            f"{sessions[-1]['device']}: it will not be bit for bit what one device would have given",
            file=sys.stderr,
        )
    return progress


def _configure(run_dir: Path, base: Run) -> None:
    """Write config.json unless it says the same; what decides the weights never changes in it."""
    if not (run_dir / "config.json").exists() or held(run_dir) != base:
        write_json(run_dir / "config.json", base.tree())


def _log(run_dir: Path, line: dict[str, Any], display: Display) -> None:
    with _writing(run_dir):
        append_line(run_dir / "metrics.jsonl", line)
        if "eval" in line:
            write_json(run_dir / "metrics.json", read_lines(run_dir / "metrics.jsonl"))
    if "eval" in line:
        display.say(f"step {line['step']}: " + ", ".join(f"{n} {_short(v)}" for n, v in line["eval"].items()))
    elif line["event"]:
        details = ", ".join(f"{n} {v}" for n, v in line.items() if n not in ("step", "event") and v)
        print(f"stepladder: {run_dir.name}: step {line['step']}: {line['event']}: {details}", file=sys.stderr)


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _figures(evaluate: Evaluate, model: LanguageModel, tokenizer: Tokenizer, run: Run) -> dict[str, float | None]:
    """Call ``evaluate`` so that training cannot notice: eval mode, no graph, own random numbers; NaN becomes None."""
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            figures = evaluate(model, tokenizer, run)
    finally:
        model.train()
    return {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}


# The end ------------------------------------------------------------------------------------------------------------


@contextmanager
def _signals() -> Iterator[Stop]:
    """Turn the first SIGTERM or SIGINT into a request to stop; the second ends the process at once."""
    stop = Stop()

    def receive(number: int, frame: Any) -> None:
        if stop.signal:
            os._exit(128 + number)
        stop.signal = number

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _summarised(run_dir: Path, asked: Asked, model: LanguageModel, progress: Progress) -> Iterator[dict[str, Any]]:
    """Write summary.json, metrics.json and the pictures, however the session ends."""
    outcome: dict[str, Any] = {"status": "failed", "reason": None}
    try:
        yield outcome
    except BaseException as error:
        outcome["reason"] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        try:
            _write_ends(run_dir, asked, model, progress, outcome)
        except (OSError, UserError) as second:  # the error on its way out matters more
            print(f"stepladder: warning: the summary could not be written: {second}", file=sys.stderr)
        raise
    if outcome["status"] == "diverged":
        causes = [line["cause"] for line in read_lines(run_dir / "metrics.jsonl") if line.get("event") == "skipped"]
        outcome["reason"] = f"{progress.skips_in_row} steps in a row without an update, the last because {causes[-1]}"
    with _writing(run_dir):
        _write_ends(run_dir, asked, model, progress, outcome)


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    """A full or read-only disk is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{run_dir} cannot be written ({error}); make room, then give the same command again: "
            f"it goes on from its last checkpoint"
        ) from error


def _write_ends(
    run_dir: Path, asked: Asked, model: LanguageModel, progress: Progress, outcome: Mapping[str, Any]
) -> None:
    lines = read_lines(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else []
    write_json(run_dir / "metrics.json", lines)
    plots.draw(run_dir, lines, asked.base.name)
    write_json(run_dir / "summary.json", _summary(asked, model, progress, outcome))


def _summary(asked: Asked, model: LanguageModel, progress: Progress, outcome: Mapping[str, Any]) -> dict[str, Any]:
    adapters = [p for module in model.modules() if isinstance(module, LowRank) for p in module.parameters()]
    # Adapters are merged where the run is loaded: they are no part of its size.
    params = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in adapters)
    embedded = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    return {
        "status": outcome["status"],
        "reason": redact(outcome["reason"]),
        "steps": progress.step,
        "updates": progress.updates,
        "skipped_steps": progress.step - progress.updates,
        "tokens": progress.tokens,
        "supervised": progress.supervised,
        "final_loss": progress.loss,
        "seconds": round(progress.seconds, 3),
        "train_flops": progress.flops,
        "tokens_per_s": round(progress.tokens / max(progress.seconds, 1e-9), 1),
        "params": params,
        "params_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "params_nonembedding": params - embedded,
        "peak_memory_bytes": _peak_memory(model.embed.tokens.weight.device),
        "hash": asked.hash(),
        "extended": asked.extended,
    }


def _peak_memory(device: torch.device) -> int:
    """Peak of this process: of GPU memory on a GPU, else of resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
