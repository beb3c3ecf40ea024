"""Drawings of models: the data agrees with the model, and the picture with the data."""

import subprocess
import sys
from xml.etree import ElementTree

import pytest

from stepladder import diagram
from stepladder.core.errors import UserError
from stepladder.models.zoo import ARCHITECTURES, spec
from stepladder.report import diagram as drawing

VOCAB = 17


def every(node):
    yield node
    for child in node["children"]:
        yield from every(child)


def texts(svg):
    return ["".join(each.itertext()) for each in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", ARCHITECTURES.names())
def test_every_architecture_is_drawn_with_the_parameters_it_has(name):
    chosen = spec(name, "tiny")
    tree = diagram.modules(chosen, VOCAB, 32)
    model = chosen.build(VOCAB)
    assert tree["params"] == sum(p.numel() for p in model.parameters())
    assert tree["flops"] == model.cost(32).flops
    below = sum(child["params"] * child["count"] for child in tree["children"])
    assert below >= tree["params"]  # all modules are there; a shared weight stands in two of them
    assert texts(drawing.modules(tree))[0].startswith(f"{name}: {tree['params']:,} parameters")


def test_ticks_are_loops_and_equal_blocks_are_one():
    tree = diagram.modules(spec("shared_loop", "tiny", depth=5), VOCAB, 32, ticks=7)
    assert [n["repeat"] for n in every(tree) if n["kind"] == "Stack"] == [7]
    (block,) = [n for n in every(tree) if n["count"] > 1]
    assert block["count"] == 5
    assert [child["children"][1]["kind"] for child in block["children"]] == ["Attention", "SwiGLU"]
    words = texts(drawing.modules(tree))
    assert "7 ticks" in words
    assert "block  × 5" in words
    assert "ticks" not in " ".join(texts(drawing.modules(diagram.modules(spec("transformer", "tiny"), VOCAB, 32)))[2:])


def loops(tree):
    """What goes round together, as names, in every module that has loops."""
    return [
        [[child["name"] for child in node["children"][first : last + 1]] + [label] for first, last, label in found]
        for node in every(tree)
        if (found := drawing._loops(node["children"]))
    ]


def test_one_loop_goes_around_all_that_is_called_in_turn():
    tree = diagram.modules(spec("recursive_halting", "tiny"), VOCAB, 32, ticks=3)
    assert loops(tree) == [[["norm", "body", "halting", "norm_out", "3 ticks"]]]
    tree = diagram.modules(spec("vectur", "tiny"), VOCAB, 32, ticks=3)  # two of these are used without being called
    assert loops(tree)[0] == [["first", "head_in", "head_out", "control_out", "write_out", "3 ticks"]]
    assert drawing.modules(tree).count("url(#loop)") == sum(map(len, loops(tree)))


def test_a_loop_along_the_text_is_not_called_ticks():
    tree = diagram.modules(spec("ssm_mem", "tiny"), VOCAB, 32)
    assert loops(tree) == [[["write_query", "write_out", "norm", "tokens"]]]


def test_modules_whose_weights_alone_are_used_stand_where_they_are_declared():
    (machine,) = [n for n in every(diagram.modules(spec("dnc", "tiny", depth=1), VOCAB, 32)) if n["kind"] == "DNC"]
    assert [child["name"] for child in machine["children"]] == ["project", "recur", "tell", "out"]


def test_names_too_long_for_their_box_do_not_run_into_its_figures():
    name = "a_node_of_which_the_name_says_everything_that_there_is_to_say_about_it_and_more"
    nodes = [
        {"name": name, "part": "swiglu", "inputs": ["input"]},
        {"name": "out", "part": "sum", "inputs": [name, "input", name]},
    ]
    tree = diagram.modules(spec("graph", "tiny", nodes=nodes), VOCAB, 32)
    words = texts(drawing.modules(tree))
    (box,) = [line for line in words if line.endswith(": Branch")]
    assert len(box) < 60
    assert box.startswith("a_node")
    assert all(len(line) < 100 for line in words[2:])
    assert f"←{name}+input+{name}" in "".join("".join(words).split())  # what it reads is all there, on several lines


def test_nothing_is_allocated():
    tree = diagram.modules(spec("transformer", "1B"), 32_000, 4096)
    assert tree["params"] > 9e8


def test_a_graph_shows_its_edges():
    tree = diagram.modules(spec("graph", "tiny"), VOCAB, 32)
    reads = {n["name"]: n["reads"] for n in every(tree) if n["reads"]}
    assert reads == {node.name: list(node.inputs) for node in spec("graph", "tiny").nodes}
    assert "mixed: sum  ← input + attention + states" in texts(drawing.modules(tree))


@pytest.mark.parametrize("name", ["transformer", "ssm", "recursive_halting"])
def test_the_autograd_graph_reaches_every_parameter(name):
    chosen = spec(name, "tiny")
    graph = diagram.autograd(chosen)
    found = [node["parameter"] for node in graph["nodes"] if node["parameter"]]
    assert sorted(found) == sorted(n for n, _ in chosen.build(7).named_parameters())
    assert graph["missed"] == []
    svg = drawing.autograd(graph)
    assert svg.count("<rect") == len(graph["nodes"]) + 1
    assert svg.count("url(#arrow)") == len(graph["edges"])


def test_a_parameter_without_gradient_is_named(monkeypatch):
    chosen = spec("transformer", "tiny")
    kept = type(chosen).build

    def build(self, vocab):
        model = kept(self, vocab)
        model.core.core.parts[0].norm.weight.requires_grad_(False)
        return model

    monkeypatch.setattr(type(chosen), "build", build)
    graph = diagram.autograd(chosen)
    assert graph["missed"] == ["core.core.parts.0.norm.weight"]
    assert "no gradient reaches core.core.parts.0.norm.weight" in " ".join(texts(drawing.autograd(graph)))


def test_layers_follow_the_edges():
    layers = drawing._layers(5, [[0, 1], [1, 2], [0, 2], [2, 3], [0, 4]])
    assert [sorted(layer) for layer in layers] == [[0], [1, 4], [2], [3]]


def test_a_graph_too_large_to_look_at_is_refused(monkeypatch):
    monkeypatch.setattr(diagram, "MOST", 10)
    with pytest.raises(UserError, match="too many to look at; make it smaller"):
        diagram.autograd(spec("transformer", "tiny"))


def test_drawing_knows_no_torch():
    probe = "import sys; import stepladder.report.diagram; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "False\n"
