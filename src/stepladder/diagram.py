"""What a drawing of a model shows, as plain data: its parts with shapes, costs and repetitions, or its autograd graph.

``report.diagram`` draws it. For the parts nothing is allocated, unless a model looks at numbers on its way.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.models.base import Part
from stepladder.models.graph import Graph
from stepladder.models.lm import LanguageModel
from stepladder.models.zoo import Spec

TOKENS = 8
"""Tokens of the forward that tells how often each module is called; a second one has twice as many."""

MOST = 1500
"""Nodes of an autograd graph that can still be looked at."""

_Calls = dict[nn.Module, list[int]]
"""When each module was called, counting calls from 0."""


def modules(spec: Spec, vocab: int, context: int, ticks: int | None = None) -> dict[str, Any]:
    """The tree of a model's modules.

    Each has its name, kind (the class), params, flops (a token, forward, all repetitions inside it counted; None where
    nothing tells), shape of its weight, repeat (calls of it for one of what holds it; 0 if a longer text has more of
    them), joins (it is called in turn with the repeated one before it), count (equal ones in a row), reads (of a
    graph's node) and children, in the order in which they are called.
    """
    try:
        model, short, long = _called(spec, vocab, ticks, "meta")
    except (RuntimeError, NotImplementedError):  # it looks at numbers on its way: those must exist
        model, short, long = _called(spec, vocab, ticks, "cpu")

    def node(name: str, module: nn.Module, outer: tuple[int, int]) -> dict[str, Any]:
        """``outer``: calls of what holds the module, in the short text and in the long one."""
        own = (len(short.get(module, ())), len(long.get(module, ())))
        held = _in_order(module, long)
        children = [node(label, child, own if all(own) else outer) for label, child in held]
        _join(children, [long.get(child, []) for _, child in held])
        if isinstance(module, Graph):
            children = [_read(module, name, inputs, children) for name, inputs in module.nodes]
        weight = getattr(module, "weight", None)
        flops = None
        if isinstance(module, Part):
            flops = module.cost(context, ticks).flops
        elif isinstance(module, nn.Linear):
            flops = 2.0 * module.weight.numel()
        each = [count / above for count, above in zip(own, outer, strict=True)]
        return {
            "name": name,
            "kind": type(module).__name__,
            "params": sum(p.numel() for p in module.parameters()),
            "flops": flops,
            "shape": list(weight.shape) if isinstance(weight, Tensor) else None,
            "repeat": 0 if each[0] < each[1] else int(each[0]) if each[0] > 1 and each[0].is_integer() else 1,
            "joins": False,
            "count": 1,
            "reads": None,
            "children": children if isinstance(module, Graph) else _folded(children),
        }

    top = node(spec.kind, model, (1, 1))
    return {**top, "flops": model.cost(context, ticks).flops, "vocab": vocab, "context": context}


def _called(spec: Spec, vocab: int, ticks: int | None, device: str) -> tuple[LanguageModel, _Calls, _Calls]:
    """A model and the calls in a short and a long forward, as in training: there, no token leaves early."""
    calls: tuple[_Calls, _Calls] = ({}, {})
    with torch.random.fork_rng(devices=[]), torch.device(device), torch.no_grad():
        model = spec.build(vocab).train()
        for times, found in enumerate(calls, start=1):
            clock = itertools.count()

            def called(module: nn.Module, *_: Any, found: _Calls = found, clock: Iterator[int] = clock) -> None:
                found.setdefault(module, []).append(next(clock))

            hooks = [module.register_forward_pre_hook(called) for module in model.modules()]
            model(torch.zeros(1, times * TOKENS, dtype=torch.int64), ticks=ticks)
            for hook in hooks:
                hook.remove()
    return model, *calls


def _in_order(module: nn.Module, calls: _Calls) -> list[tuple[str, nn.Module]]:
    """What a module holds, by first calls; those whose weights alone are used are before what is declared next.

    A call of something inside counts only for what is never called itself.
    """
    found, first = [], math.inf
    for label, child in reversed([pair for pair in _held(module) if any(True for _ in pair[1].parameters())]):
        inside = [child] if child in calls else child.modules()
        first = min((calls[each][0] for each in inside if each in calls), default=first)
        found.append((first, label, child))
    found.reverse()
    return [(label, child) for _, label, child in sorted(found, key=itemgetter(0))]


def _join(children: list[dict[str, Any]], calls: list[list[int]]) -> None:
    """Mark, in place, what is called in turn with the repeated child before it: one loop goes around both."""
    last = None
    for place, child in enumerate(children):
        if child["repeat"] != 1:
            same = last is not None and children[last]["repeat"] == child["repeat"]
            child["joins"] = same and last is not None and calls[last][1:2] > calls[place][:1]
            last = place
        elif calls[place]:  # called, but not repeated: a loop before it has ended
            last = None


def _held(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that a module holds, lists of them taken apart."""
    found = []
    for label, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            found += [(f"{label}.{each}", inside) for each, inside in child.named_children()]
        else:
            found.append((label, child))
    return found


def _read(graph: Graph, name: str, inputs: tuple[str, ...], children: list[dict[str, Any]]) -> dict[str, Any]:
    """A node of a graph with what it reads; a sum is no module, so it is made here."""
    at = next((child for child in children if child["name"] == f"parts.{graph.key(name)}"), None)
    plain = {"kind": "sum", "params": 0, "flops": None, "shape": None, "repeat": 1, "joins": False, "count": 1}
    plain["children"] = []
    return {**(at or plain), "name": name, "reads": list(inputs)}


def _folded(children: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of children alike but for their numbers, as one with a count; a run may be of up to three in turn."""

    def alike(one: dict[str, Any]) -> Any:
        return {**one, "name": re.sub(r"\d+", "", one["name"])}

    found, place = [], 0
    while place < len(children):
        for period in (1, 2, 3):
            pattern = [alike(child) for child in children[place : place + period]]
            times = 1
            while [alike(c) for c in children[place + times * period : place + (times + 1) * period]] == pattern:
                times += 1
            if times > 1 and len(pattern) == period:
                break
        else:
            period, times = 1, 1
        run = children[place : place + period]
        if period > 1:
            total = sum(child["params"] for child in run)
            flops = None if any(child["flops"] is None for child in run) else sum(child["flops"] for child in run)
            block = {"name": "block", "kind": "", "params": total, "flops": flops, "shape": None, "repeat": 1}
            run = [{**block, "joins": False, "reads": None, "children": run}]
        found += [{**child, "count": times} for child in run]
        place += period * times
    return found


_SHAPES = re.compile(
    r"(Unsafe)?(View|Reshape|T|Transpose|Permute|Expand|Squeeze|Unsqueeze|Alias|Clone|ToCopy|Slice)Backward"
)


def autograd(spec: Spec, ticks: int | None = None) -> dict[str, Any]:
    """The graph that a backward pass walks: nodes (label, parameter or None) from the loss on, and edges.

    Of three tokens; operations that only change a shape and stand in a line are left out. A graph too large to be
    looked at is a UserError.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = spec.build(7).train()
    tokens = torch.tensor([[1, 3, 5]])
    out = model(tokens, targets=tokens.roll(-1, 1), ticks=ticks)
    assert out.nll_BT is not None
    loss = out.nll_BT.sum() + sum(term.sum() for term in out.losses.values())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    edges: dict[Any, list[Any]] = {}
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in edges:
            continue
        edges[node] = list(dict.fromkeys(after for after, _ in node.next_functions if after is not None))
        waiting += edges[node]
    _contract(edges, loss.grad_fn)
    if len(edges) > MOST:
        raise UserError(
            f"the autograd graph of '{spec.kind}' has {len(edges):,} nodes, too many to look at; make it smaller, as "
            "with depth=1 ticks=1"
        )
    number = {node: place for place, node in enumerate(edges)}
    nodes = [
        {"label": re.sub(r"Backward\d*$", "", node.name()), "parameter": names.get(id(getattr(node, "variable", None)))}
        for node in edges
    ]
    missed = sorted(set(names.values()) - {node["parameter"] for node in nodes})
    lines = [[number[node], number[after]] for node, found in edges.items() for after in found]
    return {"name": spec.kind, "nodes": nodes, "edges": lines, "missed": missed}


def _contract(edges: dict[Any, list[Any]], root: Any) -> None:
    """Take out, in place, what only changes shapes between one node and one other."""
    readers = Counter(after for found in edges.values() for after in found)
    for node in list(edges):
        if node is root or not _SHAPES.match(node.name()) or readers[node] != 1 or len(edges[node]) != 1:
            continue
        (after,) = edges[node]
        above = next(each for each, found in edges.items() if node in found)
        if after in edges[above]:
            continue
        edges[above] = [after if each is node else each for each in edges[above]]
        del edges[node]
