"""Models written down as graphs: edges are honoured, mistakes are refused in a sentence."""

import pytest
import torch

from stepladder.core.config import validate
from stepladder.core.errors import UserError
from stepladder.models.graph import Node, ordered
from stepladder.models.zoo import spec
from stepladder.models.zoo.graph import GraphModel

VOCAB = 11


def nodes(**edges):
    """Sums by name: ``nodes(a="input b")``."""
    return [{"name": name, "part": "sum", "inputs": read.split()} for name, read in edges.items()]


def build(given, **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return spec("graph", width=16, nodes=given, **fields).build(VOCAB).double()


TOKENS = torch.arange(14).reshape(2, 7) % VOCAB


def test_a_chain_of_residual_blocks_is_the_looped_transformer():
    """Equal weights give equal logits: the default graph against an architecture that was not written as one."""
    plain = spec("shared_loop", width=16, depth=1, heads=2, ticks=3, hidden=40).build(VOCAB).double()
    parts = {"attention": {"kind": "attention", "heads": 2}, "channels": {"kind": "swiglu", "hidden": 40}}
    edges = {"attention": ["input"], "mixed": ["input", "attention"], "channels": ["mixed"],
             "out": ["mixed", "channels"]}  # fmt: skip
    graph = build([{"name": n, "part": parts.get(n, "sum"), "inputs": e} for n, e in edges.items()], ticks=3)
    place = {
        "core.core.parts.node_attention.": "core.core.parts.0.",
        "core.core.parts.node_channels.": "core.core.parts.1.",
    }
    weights = plain.state_dict()
    for name in graph.state_dict():
        other = name
        for ours, theirs in place.items():
            other = other.replace(ours, theirs)
        graph.state_dict()[name].copy_(weights[other])
    assert sum(p.numel() for p in graph.parameters()) == sum(p.numel() for p in plain.parameters())
    torch.testing.assert_close(graph(TOKENS).logits, plain(TOKENS).logits, rtol=1e-12, atol=1e-12)


def test_edges_are_what_is_computed_whatever_the_order_in_the_file():
    """Sums alone make the core a whole number: the count of ways from the input to the output."""
    for given in (nodes(a="input", b="input a", c="a b input"), nodes(c="a b input", b="input a", a="input")):
        core = build(given).core.core
        x = torch.randn(2, 3, 16, dtype=torch.float64)
        torch.testing.assert_close(core(x, None, None)[0], 4 * x)  # a = x, b = 2x, c = 4x
    torch.testing.assert_close(build(nodes(a="input input")).core.core(x, None, None)[0], 2 * x)


def test_an_edge_more_is_another_function():
    given = spec("graph", "tiny").model_dump(mode="json")["nodes"]
    fewer = [
        {**node, "inputs": [i for i in node["inputs"] if (node["name"], i) != ("cells", "attention")]} for node in given
    ]
    one, other = build(given), build(fewer)
    other.load_state_dict(one.state_dict())
    assert not torch.allclose(one(TOKENS).logits, other(TOKENS).logits)


@pytest.mark.parametrize(
    ("given", "flaw"),
    [
        (
            nodes(a="input b", b="c", c="a", out="a"),
            r"(a reads b reads c reads a|b reads c reads a reads b) is a cycle",
        ),
        (nodes(a="input a"), "a reads a is a cycle"),
        (nodes(first="input", b="frist"), "'b' reads 'frist', which does not exist.*'first'"),
        (nodes(a="input", b="input"), "nobody reads a, b; one node is the output"),
        ([*nodes(a="input"), *nodes(a="input")], "the name 'a' is taken"),
        (nodes(input="input"), "the name 'input' is taken"),
        (nodes(a=""), "inputs"),
        ([{"name": "a", "part": "atention", "inputs": ["input"]}], "unknown part 'atention'.*'attention'"),
        (
            [{"name": "a", "part": {"kind": "swiglu", "heads": 2}, "inputs": ["input"]}],
            "unknown key 'nodes.0.part.heads'",
        ),
        ([{"name": "a", "part": "sum", "input": ["input"]}], "'nodes.0.inputs' is missing|unknown key 'nodes.0.input'"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(given, flaw):
    with pytest.raises(UserError, match=flaw) as caught:
        validate(GraphModel, {"width": 16, "nodes": given}, "model")
    assert "\n" not in str(caught.value)


def test_the_order_is_that_of_the_file_where_edges_leave_a_choice():
    given = [Node.model_validate(node) for node in nodes(out="b a c", c="input", b="input", a="c")]
    assert [node.name for node in ordered(given)] == ["c", "b", "a", "out"]
