"""A model part made of other parts along the edges of a graph that somebody wrote down."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Annotated, cast

import torch
from pydantic import BeforeValidator
from torch import Tensor, nn

from stepladder.core.config import Config, Field, Kinded, chosen, register
from stepladder.core.errors import UserError
from stepladder.core.registry import Registry, did_you_mean
from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.channels.swiglu import SwiGLU
from stepladder.models.layers import norm
from stepladder.models.mixers.attention import Attention
from stepladder.models.mixers.lstm import LSTM, cells_like_attention
from stepladder.models.mixers.mamba2 import Mamba2
from stepladder.models.noise import Dropout
from stepladder.models.stack import apply

INPUT = "input"
"""The name of what comes into the graph."""


class PartSpec(Kinded):
    """Base of what a node may be made of: fields, and ``build``."""

    def build(self, width: int, gain: float) -> Part | None:
        """The part of a model of this width (``gain``: see layers.residual_gain), or None to pass the sum through."""
        raise NotImplementedError


PARTS: Registry[type[PartSpec]] = Registry("part")


@register(PARTS, "sum")
class Sum(PartSpec):
    """The inputs added up, and nothing else: where branches and skips meet."""

    def build(self, width: int, gain: float) -> Part | None:
        return None


@register(PARTS, "attention")
class AttentionSpec(PartSpec):
    """mixers.attention"""

    heads: int = Field(4, ge=1, description="query heads; divides width")
    kv_heads: int | None = Field(None, ge=1, description="key/value heads; divides heads; default: heads")
    rope_base: float | None = Field(10000.0, gt=1, description="base of the rotary frequencies; null: no positions")

    def build(self, width: int, gain: float) -> Part | None:
        return Attention(width, self.heads, self.kv_heads or self.heads, self.rope_base, gain)


@register(PARTS, "swiglu")
class SwiGLUSpec(PartSpec):
    """channels.swiglu"""

    hidden: int | None = Field(None, ge=1, description="hidden width; default 8/3 d, rounded to 8")

    def build(self, width: int, gain: float) -> Part | None:
        return SwiGLU(width, self.hidden or max(8, round(width * 8 / 3 / 8) * 8), gain)


@register(PARTS, "mamba2")
class Mamba2Spec(PartSpec):
    """mixers.mamba2"""

    expand: int = Field(2, ge=1, description="inner width as a multiple of the model width")
    head_width: int = Field(64, ge=1, description="channels P of a head; divides expand x width")
    groups: int = Field(1, ge=1, description="groups of heads that share B and C; divides the heads")
    state: int = Field(64, ge=1, description="state size N of a channel")
    conv: int = Field(4, ge=1, description="tokens that the causal convolution sees")
    chunk: int = Field(64, ge=2, description="tokens of a chunk of the scan")

    def build(self, width: int, gain: float) -> Part | None:
        inner = self.expand * width
        return Mamba2(width, inner, self.head_width, self.groups, self.state, self.conv, "chunked", self.chunk, gain)


@register(PARTS, "lstm")
class LSTMSpec(PartSpec):
    """mixers.lstm"""

    inner: int | None = Field(None, ge=1, description="cells; default: as many as give it attention's parameters")

    def build(self, width: int, gain: float) -> Part | None:
        return LSTM(width, self.inner or cells_like_attention(width), "fused", gain)


class Node(Config):
    """A node of the graph: a part, and the nodes whose sum it reads."""

    name: str = Field(min_length=1, description="what other nodes call it")
    part: Annotated[PartSpec, BeforeValidator(chosen(PARTS, "part"))] = Field(description="what it computes")
    inputs: tuple[str, ...] = Field(min_length=1, description=f"nodes it reads, added up; '{INPUT}': the embeddings")


def ordered(nodes: Sequence[Node]) -> list[Node]:
    """The nodes so that each comes after those it reads, in the given order where that leaves a choice; last: the one
    that nobody reads, whose value is the graph's.

    Two nodes of one name, an input that does not exist, a cycle, and several nodes that nobody reads are a UserError.
    """
    names = [node.name for node in nodes]
    for place, node in enumerate(nodes):
        if node.name == INPUT or node.name in names[:place]:
            raise UserError(f"nodes: the name '{node.name}' is taken; give every node a name of its own")
        for source in node.inputs:
            if source not in (INPUT, *names):
                hint = did_you_mean(source, [INPUT, *names])
                raise UserError(f"nodes: '{node.name}' reads '{source}', which does not exist{hint}")
    done, found, waiting = {INPUT}, [], list(nodes)
    while waiting:
        ready = next((node for node in waiting if done.issuperset(node.inputs)), None)
        if ready is None:
            raise UserError(f"nodes: {_cycle(waiting)} is a cycle; a graph is run through once, so cut it somewhere")
        waiting.remove(ready)
        done.add(ready.name)
        found.append(ready)
    read = {source for node in nodes for source in node.inputs}
    unread = [name for name in names if name not in read]
    if len(unread) != 1:
        raise UserError(
            f"nodes: nobody reads {', '.join(unread) or 'anything'}; one node is the output, so let a sum read the rest"
        )
    return [node for node in found if node.name != unread[0]] + [node for node in found if node.name == unread[0]]


def _cycle(stuck: Sequence[Node]) -> str:
    """A way around among nodes that all wait for one another, in words: a reads b reads a."""
    waits = {node.name: next(source for source in node.inputs if source in {n.name for n in stuck}) for node in stuck}
    way = [stuck[0].name]
    while waits[way[-1]] not in way:
        way.append(waits[way[-1]])
    return " reads ".join([*way[way.index(waits[way[-1]]) :], waits[way[-1]]])


class Branch(Part):
    """dropout(part(norm x)): what a node computes from the sum of its inputs. The skip is an edge, if there is one."""

    def __init__(self, width: int, part: Part, dropout: float) -> None:
        super().__init__()
        self.norm, self.part, self.dropout = norm(width), part, Dropout(dropout)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        wide_BTD = x_BTD.to(self.norm.weight.dtype)  # under mixed precision, what other nodes gave is narrow
        y_BTD, state = self.part(self.norm(wide_BTD), state, ctx)
        return self.dropout(y_BTD, ctx), state

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        return self.part.init_state(batch, capacity, device, dtype, ticks)

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        return Cost(self.norm.weight.numel()) + self.part.cost(context, ticks)


class Graph(Part):
    """The nodes of a graph, each computed once from the sum of what it reads; the last one's value goes on.

    The state is that of every node that computes something, in the order of computation.
    """

    def __init__(self, nodes: Sequence[Node], width: int, gain: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.nodes = [(node.name, node.inputs) for node in ordered(nodes)]
        self.parts = nn.ModuleDict()
        for node in ordered(nodes):
            part = node.part.build(width, gain)
            if part is not None:
                self.parts[self.key(node.name)] = Branch(width, part, dropout)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        values: dict[str, Tensor] = {INPUT: x_BTD}
        after: list[State] = []
        for name, inputs in self.nodes:
            y_BTD = reduce(add, (values[source] for source in inputs))
            if self.key(name) in self.parts:
                before = None if state is None else state[len(after)]
                y_BTD, carried = apply(cast(Part, self.parts[self.key(name)]), y_BTD, before, ctx)
                after.append(carried)
            values[name] = y_BTD
        return y_BTD, tuple(after)

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        return tuple(part.init_state(batch, capacity, device, dtype, ticks) for part in self._parts())

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        return reduce(add, (part.cost(context, ticks) for part in self._parts()), Cost())

    def _parts(self) -> list[Part]:
        return [cast(Part, part) for part in self.parts.values()]

    @staticmethod
    def key(name: str) -> str:
        """A node's name as a module's: those have no dots, and must not be those of a module's own."""
        return "node_" + name.replace(".", "_dot_")
