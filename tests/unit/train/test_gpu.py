"""Training on a GPU: the same figures as on a CPU, masters in float32, and a resume that goes on where it stopped."""

from __future__ import annotations

import signal

import pytest
import torch

from stepladder.core.files import read_json, read_lines
from stepladder.models.weights import load_tensors
from stepladder.run import latest_checkpoint, load
from stepladder.train.session import Interrupted, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


def losses(home) -> list[float]:
    return [line["loss"] for line in read_lines(home / "metrics.jsonl") if "loss" in line]


def test_a_gpu_trains_like_a_cpu(tmp_path, tiny):
    fields = {"steps": 20, "batch": 16, "micro": 8, "recompute": True, "model": {"dropout": 0.1}}
    cpu = train(tiny("cpu", **fields), tmp_path, quiet=True)
    gpu = train(tiny("gpu", device="cuda", **fields), tmp_path, quiet=True)
    assert losses(gpu) == pytest.approx(losses(cpu), rel=1e-3)
    assert read_json(gpu / "summary.json")["peak_memory_bytes"] > 0
    assert load(gpu).model.embed.tokens.weight.device.type == "cpu"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_goes_on_where_it_stopped(tmp_path, tiny, precision):
    def stop_once(model, tokenizer, run):
        if not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            signal.raise_signal(signal.SIGTERM)
        return {}

    fields = {"device": "cuda", "precision": precision, "eval_every": 3, "model": {"dropout": 0.1}}
    whole = train(tiny("whole", **fields), tmp_path, evaluate=lambda *_: {}, quiet=True)
    with pytest.raises(Interrupted):
        train(tiny("cut", **fields), tmp_path, evaluate=stop_once, quiet=True)
    assert load(tmp_path / "cut").step == 3
    cut = train(tiny("cut", **fields), tmp_path, evaluate=stop_once, quiet=True)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-4)
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_tensors(latest_checkpoint(home) / file) for home in (cut, whole))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiled_bf16_trains_like_eager_fp32(tmp_path, tiny):
    eager = train(tiny("eager", device="cuda", steps=20), tmp_path, quiet=True)
    fast = train(tiny("fast", device="cuda", steps=20, precision="bf16", compile=True), tmp_path, quiet=True)
    assert losses(fast) == pytest.approx(losses(eager), rel=3e-2)


def test_a_step_that_does_not_fit_takes_fewer_rows(tmp_path, tiny):
    fields = {"device": "cuda", "steps": 3, "batch": 4096, "micro": "auto", "memory": 1e6, "model": {"width": 256}}
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (2 << 30) / total))
    try:
        home = train(tiny(**fields), tmp_path, quiet=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    choices = read_json(home / "micro.json")["choices"]
    assert choices[-1]["rows"] < 4096
    assert read_json(home / "summary.json")["updates"] == 3
