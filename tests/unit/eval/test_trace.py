"""A recording holds what one forward of the model noted, token by token."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from stepladder.core.errors import UserError
from stepladder.core.files import read_json
from stepladder.data.tokenizers import BOS
from stepladder.eval.trace import record
from stepladder.models.zoo import ARCHITECTURES
from stepladder.report.trace import write

TEXT = "3+4=7 é\n"


@pytest.mark.parametrize("kind", ARCHITECTURES.names())
def test_any_architecture_is_recorded_and_drawn(make, tmp_path, kind):
    loaded = make(model=kind, fields=ARCHITECTURES.get(kind).tiny)
    home = record(loaded, TEXT, tmp_path / "new" / "trace", key=5)
    arrays, about = load_file(home / "trace.safetensors"), read_json(home / "trace.json")
    ids = [BOS, *loaded.tokenizer.encode(TEXT).tolist()]
    assert arrays["token"].tolist() == ids
    assert {len(each) for each in arrays.values()} == {len(ids)}
    tokens = torch.tensor([ids])
    with torch.no_grad():
        out = loaded.model(tokens, key=5, trace=True)
    nll = -out.logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].numpy()
    np.testing.assert_allclose(arrays["nll"][:-1], nll, rtol=1e-5)
    assert np.isnan(arrays["nll"][-1])
    assert arrays.keys() == {"token", "nll", *out.trace}
    for name, value in out.trace.items():
        np.testing.assert_array_equal(arrays[name], value[0].numpy())
    assert about["architecture"] == kind
    assert about["text"] == TEXT
    assert about["tokens"] == ["⟨bos⟩", "3", "+", "4", "=", "7", "␣", "\\xc3", "\\xa9", "⏎"]
    page = write(home).read_text()
    assert all(f"<h3>{name}</h3>" in page for name in ("ticks", "nll"))
    assert ("<h2>vectur0</h2>" in page) == (kind == "vectur")


def test_the_tick_budget_and_the_key_are_passed_on(make, tmp_path):
    loaded = make(model="vecstur", fields={"ticks": 3})
    found = {
        case: load_file(record(loaded, TEXT, tmp_path / case, **call) / "trace.safetensors")
        for case, call in {"own": {}, "again": {}, "more": {"ticks": 5}, "other": {"key": 1}}.items()
    }
    assert found["own"]["vecstur0.gate"].shape[1] == 3
    assert found["more"]["vecstur0.gate"].shape[1] == 5
    np.testing.assert_array_equal(found["own"]["nll"], found["again"]["nll"])
    assert not np.array_equal(found["own"]["nll"], found["other"]["nll"])
    with pytest.raises(UserError, match="ticks=5 means nothing"):
        record(make(), TEXT, tmp_path / "no_loop", ticks=5)


def test_nothing_to_trace_is_refused(make, tmp_path):
    with pytest.raises(UserError, match="nothing to trace"):
        record(make(), "", tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_numbers_in_bfloat16_are_written_so_that_numpy_reads_them(make, tmp_path):
    loaded = make(model="act", fields={"ticks": 3})
    loaded.model.bfloat16()
    arrays = load_file(record(loaded, TEXT, tmp_path) / "trace.safetensors")
    assert all(each.dtype in (np.float32, np.float64, np.int64) for each in arrays.values())
