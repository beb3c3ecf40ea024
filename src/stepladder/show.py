"""What an architecture is made of and what it costs, and where the five hops of training are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from rich.tree import Tree
from torch import nn

from stepladder.core.errors import UserError
from stepladder.experiments.match import cost
from stepladder.models.base import Part
from stepladder.models.lm import LanguageModel
from stepladder.models.zoo import Spec
from stepladder.train import loop, session, step


def costs(spec: Spec, vocab: int, contexts: str, batch: int, ticks: int | None) -> Table:
    """Parameters, FLOPs, state and memory at several context lengths, comma-separated."""
    lengths = [int(length) for length in contexts.split(",") if length.strip().isdecimal() and int(length) > 0]
    if len(lengths) < len(contexts.split(",")):
        raise UserError(f"--context {contexts}: give positive whole numbers, comma-separated, such as 128,1024")
    table = Table(title=f"{spec.kind}, vocabulary {vocab}, batch {batch}, float32")
    columns = ("context", "ticks", "parameters", "FLOPs/token", "training FLOPs/token", "state/sequence")
    for column in (*columns, "training memory", "decoding memory"):
        table.add_column(column, justify="right")
    for context in lengths:
        price = cost(spec, vocab, context, ticks)
        # Weights, gradients and two AdamW moments, and the saved activations, measured as about 14 vectors of the
        # model width a residual layer; weights and state alone when decoding.
        train = 16 * price.params + activations(spec, vocab, batch * context, ticks)
        decode = 4 * price.params + batch * price.state_bytes
        own = str(ticks or getattr(spec, "ticks", 1))
        table.add_row(
            f"{context:,}", own, f"{price.params:,}", f"{price.flops:,.0f}", f"{3 * price.flops:,.0f}",
            size(price.state_bytes), size(train), size(decode),
        )  # fmt: skip
    return table


def activations(spec: Spec, vocab: int, tokens: int, ticks: int | None) -> float:
    """Bytes of activations saved for the backward pass: outputs of all linear maps, and twice their inputs."""
    with torch.device("meta"):
        model = spec.build(vocab)
    repeats = ticks or getattr(spec, "ticks", 1)
    linear = [m for m in model.core.modules() if isinstance(m, nn.Linear)]
    per_token = sum(m.out_features + 2 * m.in_features for m in linear) * repeats + vocab
    return 4.0 * tokens * per_token


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def layers(spec: Spec, vocab: int) -> Tree:
    """The module tree with shapes and parameter counts; what a loop repeats is marked."""
    with torch.device("meta"):
        model: LanguageModel = spec.build(vocab)
    ticks = getattr(spec, "ticks", 1)
    top = Tree(f"[bold]{spec.kind}[/bold]  {sum(p.numel() for p in model.parameters()):,} parameters")
    _branch(top, model, ticks)
    return top


def _branch(tree: Tree, module: nn.Module, ticks: int) -> None:
    for name, child in module.named_children():
        params = sum(p.numel() for p in child.parameters())
        if not params:
            continue
        shape = " × ".join(map(str, child.weight.shape)) if hasattr(child, "weight") else ""
        loop_mark = f"  [magenta]↻ {ticks} ticks[/magenta]" if name == "core" and ticks > 1 and _is_loop(module) else ""
        label = f"{name}: [cyan]{type(child).__name__}[/cyan] {shape}  [dim]{params:,}[/dim]{loop_mark}"
        _branch(tree.add(label), child, ticks)


def _is_loop(module: nn.Module) -> bool:
    return isinstance(module, Part)


def hops(command: Callable[..., Any]) -> list[str]:
    """The five hops from the command line's ``command`` to the gradient, with file and line."""
    chain: list[tuple[str, Callable[..., Any]]] = [
        ("cli.train", command),
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
