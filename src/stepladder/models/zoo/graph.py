"""A model that is written down as a graph of parts, in the run file itself."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator

from stepladder.core.config import Field
from stepladder.models.graph import INPUT, Graph, Node, ordered
from stepladder.models.layers import residual_gain
from stepladder.models.lm import LanguageModel
from stepladder.models.recurrences.loop import Loop
from stepladder.models.spec import Spec, architecture

TINY = [
    {"name": "attention", "part": {"kind": "attention", "heads": 2}, "inputs": [INPUT]},
    {"name": "states", "part": {"kind": "mamba2", "head_width": 8, "state": 4, "chunk": 8}, "inputs": [INPUT]},
    {"name": "out", "part": "sum", "inputs": ["mixed", "channels", "cells"]},
    {"name": "channels", "part": "swiglu", "inputs": ["mixed"]},
    {"name": "cells", "part": {"kind": "lstm", "inner": 12}, "inputs": ["channels", "attention"]},
    {"name": "mixed", "part": "sum", "inputs": [INPUT, "attention", "states"]},
]
BLOCK = (
    Node.model_validate({"name": "attention", "part": "attention", "inputs": [INPUT]}),
    Node.model_validate({"name": "mixed", "part": "sum", "inputs": [INPUT, "attention"]}),
    Node.model_validate({"name": "channels", "part": "swiglu", "inputs": ["mixed"]}),
    Node.model_validate({"name": "out", "part": "sum", "inputs": ["mixed", "channels"]}),
)
"""A transformer's block: what a graph is that nobody wrote."""


@architecture("graph", tiny={"width": 16, "ticks": 2, "nodes": TINY})
class GraphModel(Spec):
    """A looped model whose core is a graph of parts: branches, skips and joins as its ``nodes`` say.

    Source: the graph-defined models of the recursive-halting ancestor (spec "halting", 6). Differs from them in: every
    node reads what its edges say, where the ancestor's read the node before it in the file; joins add up; what is
    unknown or circular is refused, not dropped; all parts are causal and carry state; norms stand before parts, and
    the graph is applied ``ticks`` times as in ``shared_loop``, with its input heard again at every tick.
    """

    knobs: ClassVar[tuple[str, ...]] = ("width",)
    sizes: ClassVar[dict[str, dict[str, Any]]] = {}

    width: int = Field(128, ge=4, description="model width d")
    nodes: tuple[Node, ...] = Field(BLOCK, min_length=1, description="the graph: name, part and inputs of every node")
    ticks: int = Field(1, ge=1, description="applications of the whole graph")
    inject: bool = Field(True, description="whether the embedded input is added again at every tick")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on what each part gives")
    tied: bool = Field(False, description="whether the head shares the embedding's weights")

    @model_validator(mode="after")
    def _check(self) -> GraphModel:
        ordered(self.nodes)
        return self

    def build(self, vocab: int) -> LanguageModel:
        computing = sum(node.part.kind != "sum" for node in self.nodes)
        core = Graph(self.nodes, self.width, residual_gain(max(1, computing * self.ticks // 2)), self.dropout)
        return LanguageModel(vocab, self.width, Loop(core, self.width, self.ticks, self.inject), tied=self.tied)
