"""Weights in files; hostile files are in tests/faults/test_checkpoint.py."""

from __future__ import annotations

import json

import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.models.weights import load_tensors, load_weights, named_weights, save_tensors, save_weights
from stepladder.models.zoo import ARCHITECTURES, spec


@pytest.mark.parametrize("kind", ARCHITECTURES.names())
def test_a_round_trip_gives_equal_logits_and_equal_bytes(tmp_path, kind):
    one, two = spec(kind, "tiny").build(11), spec(kind, "tiny").build(11)
    save_weights(one, tmp_path / "one.safetensors")
    assert load_weights(two, tmp_path / "one.safetensors") == []
    save_weights(two, tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(one.eval()(tokens).logits, two.eval()(tokens).logits)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model = spec("transformer", "tiny", tied=True).build(11)
    model.alias = model.embed.tokens  # one more owner of the same tensor
    save_weights(model, tmp_path / "w.safetensors")
    names = load_tensors(tmp_path / "w.safetensors").keys()
    assert names == named_weights(model).keys()
    assert len(names) == len(list(model.parameters()))
    again = spec("transformer", "tiny", tied=True).build(11)
    again.alias = again.embed.tokens
    load_weights(again, tmp_path / "w.safetensors")
    assert torch.equal(again.alias.weight, model.embed.tokens.weight)
    assert again.alias.weight is again.embed.tokens.weight


def test_odd_tensors_survive(tmp_path):
    tensors = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "strided": torch.arange(6.0).view(2, 3).t(),
        "numbers": torch.tensor([-1, 2**40]),
    }
    save_tensors(tensors, tmp_path / "t.safetensors")
    found = load_tensors(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_metadata_of_other_programs_is_no_tensor(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert load_tensors(tmp_path / "m.safetensors")["w"].tolist() == [0.0]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.safetensors: no such file"):
        load_tensors(tmp_path / "absent.safetensors")


def test_long_lists_of_misfits_are_cut(tmp_path):
    save_tensors({f"t{i}": torch.zeros(1) for i in range(50)}, tmp_path / "t.safetensors")
    with pytest.raises(UserError, match=r"; and \d+ more; give the configuration they came from"):
        load_weights(spec("transformer", "tiny").build(11), tmp_path / "t.safetensors")
