"""What an architecture is made of and what it costs, and where the five hops of training are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree
from torch import nn

from stepladder.core.config import Config, canonical, validate
from stepladder.core.errors import UserError
from stepladder.data.stream import DataConfig
from stepladder.experiments.ladder import Ladder
from stepladder.experiments.match import cost
from stepladder.experiments.sweep import Sweep
from stepladder.models.lm import LanguageModel
from stepladder.models.zoo import Spec
from stepladder.report.words import quantity
from stepladder.run import EvalConfig, TrainConfig
from stepladder.train import loop, session, step
from stepladder.train.memory import decoding, training

SECTIONS: dict[str, type[Config]] = {
    "train": TrainConfig,
    "data": DataConfig,
    "eval": EvalConfig,
    "ladder": Ladder,
    "sweep": Sweep,
}
"""The parts of run, ladder and sweep files by name: ``stepladder show train`` lists their fields."""


MEMORY = (
    "Measured on the calls themselves, nothing allocated. saved: for the backward pass. train in: the peak of an "
    "update with AdamW. state: kept from token to token. decode in: the peak of a prompt and one more token."
)
"""What the columns of memory say; ``train.memory`` tells what they leave out."""


def costs(of: Spec, vocab: int, contexts: str, batch: int, ticks: int | None = None, precision: str = "fp32") -> Table:
    """Parameters, FLOPs and measured memory at several context lengths, comma-separated.

    ``precision`` is that of training; decoding is in float32. A context that the model refuses has an empty row.
    """
    lengths = [int(length) for length in contexts.split(",") if length.strip().isdecimal() and int(length) > 0]
    if len(lengths) < len(contexts.split(",")):
        raise UserError(f"--context {contexts}: give positive whole numbers, comma-separated, such as 128,1024")
    train = validate(TrainConfig, {"steps": 1, "precision": precision}, "train")
    rows: dict[int, list[str]] = {}
    refused: dict[int, UserError] = {}
    for context in lengths:
        try:
            rows[context] = _costs(of, vocab, context, batch, ticks, train)
        except UserError as error:
            rows[context], refused[context] = [], error
    if not any(rows.values()):
        raise refused[lengths[0]]
    own = ticks or getattr(of, "ticks", None) or 1
    title = f"{of.kind}, vocabulary {vocab:,}, batch {batch}, {own} tick{'s'[: own > 1]}, trained in {precision}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    for column in ("context", "params", "FLOPs/tok", "to train", "saved", "train in", "state", "decode in"):
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))  # 80 characters hold them all
    for context, row in rows.items():
        table.add_row(f"{context:,}", *row)
    table.caption = escape("\n".join([MEMORY, *(f"{context:,}: {error}" for context, error in refused.items())]))
    return table


def _costs(of: Spec, vocab: int, context: int, batch: int, ticks: int | None, train: TrainConfig) -> list[str]:
    update = training(of, vocab, batch, context, train, ticks)
    reading = decoding(of, vocab, batch, context, ticks)
    price = cost(of, vocab, context, ticks)
    counts = (price.params, price.flops, price.train_flops)
    return [*map(quantity, counts), *map(size, (update.saved, update.peak, reading.state, reading.peak))]


def fields(name: str, of: type[Config]) -> Table:
    """The fields of a configuration: name, default, what it is."""
    table = Table("field", "default", "what it is", title=f"{name}: fields", box=box.SIMPLE_HEAD, pad_edge=False)
    for field, info in of.model_fields.items():
        if field == "kind":  # the name itself
            continue
        default = "required" if info.is_required() else _shown(info.get_default(call_default_factory=True))
        table.add_row(field, escape(default), escape(info.description or ""))
    return table


def _shown(default: Any) -> str:
    """A default as it would be written in a file; a configuration inside another is "its own"."""
    return "its own" if isinstance(default, Config) else canonical(default)


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.4g} PiB"


def layers(spec: Spec, vocab: int, ticks: int | None = None) -> Tree:
    """The module tree with shapes and parameter counts. What ticks repeat is for a forward to tell: ``diagram``."""
    with torch.device("meta"):
        model: LanguageModel = spec.build(vocab)
    ticks = ticks or getattr(spec, "ticks", None) or 1
    looped = f"; {ticks} ticks, of which stepladder draw {spec.kind} shows the loop" if ticks > 1 else ""
    top = Tree(f"[bold]{spec.kind}[/bold]  {sum(p.numel() for p in model.parameters()):,} parameters{looped}")
    _branch(top, model)
    return top


def _branch(tree: Tree, module: nn.Module) -> None:
    for name, child in module.named_children():
        params = sum(p.numel() for p in child.parameters())
        if not params:
            continue
        weight = getattr(child, "weight", None)
        shape = " × ".join(map(str, weight.shape)) if isinstance(weight, torch.Tensor) else ""
        _branch(tree.add(f"{name}: [cyan]{type(child).__name__}[/cyan] {shape}  [dim]{params:,}[/dim]"), child)


def hops(command: Callable[..., Any]) -> list[str]:
    """The five hops from the command line's ``command`` to the gradient, with file and line."""
    chain: list[tuple[str, Callable[..., Any]]] = [
        ("cli.runs.train", command),
        ("train.session.train", session.train),
        ("train.loop.fit", loop.fit),
        ("train.step.gradient_step", step.gradient_step),
        ("models.lm.LanguageModel.forward", LanguageModel.forward),
    ]
    lines = []
    for name, function in chain:
        file = (inspect.getsourcefile(function) or "").rpartition("stepladder/")[2]
        lines.append(f"{name:<34} src/stepladder/{file}:{inspect.getsourcelines(function)[1]}")
    return lines
