"""Training on images: the encoder is trained, saved and gone on with like everything else."""

import numpy as np
import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.core.files import read_json, read_lines
from stepladder.data.stream import Stream
from stepladder.eval import suite
from stepladder.models.weights import load_tensors
from stepladder.run import Run, cache_folder, load
from stepladder.train.optim import optimizer
from stepladder.train.session import body, build, train
from stepladder.train.step import gradient_step


@pytest.fixture
def seeing(tmp_path, write_idx):
    """``seeing(name, kind=..., source={...}, **train fields)``: a run on little images."""
    write_idx(tmp_path / "bars", train=400)

    def make(name="run", kind="transformer", source=None, encoder=None, **fields):
        budget = {} if {"tokens", "flops"} & set(fields) else {"steps": 6}
        return Run.of(
            {
                "name": name,
                "model": {"kind": kind, "width": 16, "depth": 1, "heads": 2},
                "encoder": {"kind": "conv", "side": 8, "hidden": 8, **(encoder or {})},
                "data": {
                    "sequence": 28,
                    "sources": [{"kind": "images", "path": str(tmp_path / "bars"), **(source or {})}],
                },
                "train": {**budget, "device": "cpu", "batch": 4, "log_every": 2, **fields},
                "eval": {"suites": ["vision"], "samples": 40},
            }
        )

    return make


def weights(folder):
    return load_tensors(max(folder.glob("checkpoints/step-*")) / "model.safetensors")


@pytest.mark.parametrize("kind", ["raw", "conv", "patch", "wavelet", "siren"])
def test_one_step_moves_every_weight_of_the_encoder(seeing, kind):
    shape = {"conv": {"hidden": 8}, "wavelet": {"grid": 2}}.get(kind, {})
    tree = seeing().tree()
    tree = {**tree, "encoder": {"kind": kind, "side": 8, **shape}, "data": {**tree["data"], "sequence": 80}}
    for field in ("slots", "side", "channels"):
        tree["data"]["sources"][0].pop(field)
    run = Run.of(tree)
    stream, model = Stream(run.data, 0, cache_folder()), build(run, 259)
    before = {name: value.clone() for name, value in model.vision.named_parameters()}
    taken = gradient_step(
        model, optimizer(model, run.train), stream.batch(0, np.arange(4), 4), run.train, lr=1e-3, noise=0
    )
    assert not taken.refused
    assert [name for name, value in model.vision.named_parameters() if torch.equal(value, before[name])] == []


def test_it_learns_the_bars_and_what_is_loaded_is_what_was_trained(seeing, tmp_path):
    run = seeing(steps=120, batch=8, lr=0.01, eval_every=60, eval_samples=20)
    folder = train(run, tmp_path / "runs", evaluate=suite.quick, quiet=True)
    loaded = load(folder)
    (results,) = suite.evaluate(loaded, ["vision"], quiet=True)
    assert results["cells"][0]["accuracy"] >= 0.9
    assert (folder / "accuracy.png").exists()
    scores = [line["eval"]["vision/bars"] for line in read_lines(folder / "metrics.jsonl") if "eval" in line]
    assert len(scores) == 2
    for name, value in weights(folder).items():
        assert torch.equal(loaded.model.state_dict()[name], value)
    assert any(name.startswith("vision.") for name in weights(folder))
    known = read_json(folder / "data.json")
    assert known["overlap"] == {"bars": {"images": 40, "exact": 0}}
    assert known["images"]["bars"]["tokens_per_example"] == 7


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_is_the_whole_one(seeing, tmp_path, name):
    fields = {"optimizer": name, "schedule": "constant", "warmup": 0.0, "save_every": 3}
    source = {"augment": {"probability": [[0, 0.0], [6, 1.0]]}, "multiplicity": 2}
    whole = train(seeing("whole", source=source, **fields), tmp_path / "runs", quiet=True)
    part = train(seeing("part", source=source, **fields), tmp_path / "runs", quiet=True)
    last = part / "checkpoints" / "step-00000006"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    (part / "summary.json").unlink()
    train(seeing("part", source=source, **fields), tmp_path / "runs", quiet=True)
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(part)[key]), key


def test_micro_batches_and_a_horizon_see_the_same_images(seeing):
    run = seeing()
    stream = Stream(run.data, 0, cache_folder())
    batch = stream.batch(0, np.arange(4), 4)
    losses = {}
    for name, fields in {"whole": {}, "micro": {"micro": 2}, "horizon": {"horizon": 5}}.items():
        model = build(run, 259)
        settings = run.train.model_copy(update=fields)
        losses[name] = gradient_step(model, optimizer(model, settings), batch, settings, lr=1e-3, noise=0).loss
    assert losses["micro"] == pytest.approx(losses["whole"], rel=1e-5)
    assert losses["horizon"] == pytest.approx(losses["whole"], rel=1e-5)


def test_a_frozen_encoder_stays_as_it_was_and_the_rest_learns(seeing, tmp_path):
    run = seeing(freeze_encoder=True)
    start = {name: value.clone() for name, value in build(run, 259).state_dict().items()}
    after = weights(train(run, tmp_path / "runs", quiet=True))
    moved = {name for name, value in after.items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if not name.startswith("vision.")}
    blind = {**run.tree(), "encoder": None, "data": {"sources": [{"kind": "task", "task": "copy"}]}}
    with pytest.raises(UserError, match="no encoder to freeze"):
        Run.of(blind)


def test_the_ratio_counts_the_true_parameters(seeing, tmp_path):
    folder = train(seeing(source={"ratio": 3.0, "augment": {}}), tmp_path / "runs", quiet=True)
    about = read_json(folder / "data.json")["images"]["bars"]
    model = load(folder).model
    outside = model.embed.tokens.weight.numel() + model.head.own.weight.numel()
    assert about["params"] == body(model) == sum(p.numel() for p in model.parameters()) - outside
    assert about["ratio"] >= 3.0 > (about["multiplicity"] - 1) * about["train"] * 7 / about["params"]
    assert about["multiplicity"] > 1


def test_the_encoder_is_in_the_flops(seeing, tmp_path):
    folder = train(seeing(), tmp_path / "runs", quiet=True)
    model = load(folder).model
    extra = 4 * model.vision.cost().flops / 28
    assert read_json(folder / "summary.json")["train_flops"] == pytest.approx(
        3 * (model.cost(28).flops + extra) * 6 * 4 * 28
    )


def test_any_loop_takes_images(seeing, tmp_path):
    run = seeing(kind="shared_loop", steps=2)
    assert load(train(run, tmp_path / "runs", quiet=True)).model.vision is not None
