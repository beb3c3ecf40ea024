"""The exported decode step against our own decoder, run by onnxruntime."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from stepladder.core.errors import UserError
from stepladder.eval.decode import generate
from stepladder.export.onnx import _run, export
from stepladder.models.base import leaves
from stepladder.models.zoo import spec

VOCAB, NEW = 31, 10
PROMPT = [1, 17, 4, 9, 30]


def build(name, **fields):
    chosen = spec(name, "tiny", **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return chosen, chosen.build(VOCAB).eval()


def decode(file, prompt, new):
    """Greedy text and the logits of every step, as somebody without Stepladder would."""
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    state = load_file(f"{file}.start.safetensors")
    text, seen = list(prompt), []
    for place in range(len(prompt) + new - 1):
        found = session.run(None, {"tokens": np.array([[text[place]]]), **state})
        seen.append(found[0][0])
        named = zip((each.name for each in session.get_outputs()), found, strict=True)
        state = {name.replace("next.", "state."): value for name, value in named if name != "logits"}
        if place >= len(prompt) - 1:
            text.append(int(found[0][0].argmax()))
    return text[len(prompt) :], np.stack(seen)


@pytest.fixture(autouse=True)
def extra():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that are not ours, at import
        pytest.importorskip("onnx", reason="needs the extra onnx")
        pytest.importorskip("onnxscript", reason="needs the extra onnx")
        pytest.importorskip("onnxruntime", reason="needs the extra onnx")
        yield


@pytest.mark.parametrize(
    ("name", "ticks"),
    [
        ("transformer", None),
        ("ssm", None),
        ("lstm", None),
        ("shared_loop", 2),
        ("graph", None),
        ("recursive_halting", None),
    ],
)
def test_onnxruntime_writes_what_we_write(name, ticks, tmp_path):
    chosen, model = build(name)
    file = tmp_path / "step.onnx"
    about = export(chosen, model, file, capacity=len(PROMPT) + NEW, ticks=ticks)
    text, logits = decode(file, PROMPT, NEW)
    (ours,) = generate(model, [np.array(PROMPT)], max_new=NEW, eos=None, ticks=ticks)
    assert text == ours.tokens.tolist()
    with torch.no_grad():
        want = model(torch.tensor([[*PROMPT, *text[:-1]]]), ticks=ticks).logits[0].numpy()
    assert np.abs(logits - want).max() < 1e-4
    assert np.abs(logits - logits[::-1]).max() > 1e-2  # steps differ, so the state is used
    assert json.loads((tmp_path / "step.onnx.json").read_text()) == about


@pytest.mark.parametrize("name", ["dnc", "vectur"])
def test_architectures_that_no_graph_can_hold_are_refused(name, tmp_path, capfd):
    """One fails in torch's exporter, the other where onnxruntime runs what the exporter wrote; neither prints it."""
    with pytest.raises(UserError, match=f"'{name}' cannot be written as an ONNX graph"):
        export(*build(name), tmp_path / "step.onnx", capacity=8)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_computes_something_else_is_caught():
    class Off:
        def run(self, _, given):
            out = model(torch.from_numpy(given["tokens"]), start, logits_at="last")
            return [out.logits[:, -1].numpy() + 1e-3, *(leaf.numpy() for leaf in leaves(out.state))]

    _, model = build("transformer")
    start = model.init_state(1, 8)
    with torch.no_grad(), pytest.raises(ValueError, match=r"logits are 0\.001 off"):
        _run(Off(), model, start, None)


def test_what_cannot_be_exported_is_refused_in_one_sentence(tmp_path):
    class Data(torch.nn.Module):
        def forward(self, x):
            return x + 1 if bool(x.sum() > 0) else x

    chosen, model = build("transformer")
    model.norm = Data()
    type(chosen).build, kept = (lambda self, vocab: model), type(chosen).build
    try:
        with pytest.raises(UserError, match="'transformer' cannot be written as an ONNX graph") as caught:
            export(chosen, model, tmp_path / "step.onnx")
    finally:
        type(chosen).build = kept
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
