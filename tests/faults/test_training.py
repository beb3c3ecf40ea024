"""Faults around training: NaNs, spikes, dead parameters, unequal micro-batches, signals, longer budgets, devices."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.core.files import read_json, read_lines
from stepladder.data.stream import Batch, Stream
from stepladder.models.base import IGNORE
from stepladder.models.weights import named_weights
from stepladder.models.zoo import ARCHITECTURES
from stepladder.run import Run, latest_checkpoint, load
from stepladder.train import loop, session
from stepladder.train.optim import adamw, learning_rate, optimizer_tensors
from stepladder.train.session import build, train
from stepladder.train.step import OutOfMemory, gradient_step


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("STEPLADDER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def tiny_run(name="run", kind="transformer", model=None, **fields) -> Run:
    """A run of a few milliseconds a step; ``fields`` go to train."""
    return Run.of(
        {
            "name": name,
            "seed": 5,
            "model": {"kind": kind, **ARCHITECTURES.get(kind).tiny, **(model or {})},
            "data": {"sequence": 32, "tokenizer": "alphabet", "sources": [{"kind": "task", "task": "copy"}]},
            "train": {"device": "cpu", "steps": 6, "batch": 4, "log_every": 1, **fields},
        }
    )


class Bench:
    """A model, its optimizer after one update, and a batch."""

    def __init__(self, run: Run, tmp_path: Path) -> None:
        self.run = run
        self.stream = Stream(run.data, run.seed, tmp_path)
        self.model = build(run, self.stream.tokenizer.vocab)
        self.optimizer = adamw(self.model, run.train)
        self.step()

    def batch(self, step=1) -> Batch:
        return self.stream.batch(step, np.arange(self.run.train.batch), self.run.train.batch)

    def step(self, batch=None, **options):
        return gradient_step(
            self.model, self.optimizer, batch or self.batch(), self.run.train, **{"lr": 1e-2, "noise": 7, **options}
        )

    def bits(self) -> dict[str, bytes]:
        tensors = {**named_weights(self.model), **optimizer_tensors(self.model, self.optimizer)}
        return {name: tensor.detach().clone().numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture
def bench(tmp_path):
    return Bench(tiny_run(), tmp_path)


@pytest.mark.parametrize("kind", ARCHITECTURES.names())
def test_T3_recomputed_activations_give_equal_gradients(tmp_path, kind):
    noisy = {"dropout": 0.3} if "dropout" in ARCHITECTURES.get(kind).model_fields else {}
    found = []
    for recompute in (False, True):
        run = tiny_run(kind=kind, model=noisy, recompute=recompute)
        bench = Bench(run, tmp_path)
        bench.step()
        found.append({name: p.grad for name, p in bench.model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-7)


def poison_forward(monkeypatch, model, row):
    """A NaN in the loss of one row, as a broken kernel would leave it."""
    real = model.forward

    def forward(*args, **kwargs):
        output = real(*args, **kwargs)
        nll = output.nll_BT.clone()
        nll[row, 3] = math.nan
        return dataclasses.replace(output, nll_BT=nll)

    monkeypatch.setattr(model, "forward", forward)


def test_T5_a_nan_in_the_loss_changes_no_bit_and_names_the_row(bench, monkeypatch):
    before = bench.bits()
    with monkeypatch.context() as patch:
        poison_forward(patch, bench.model, row=2)
        taken = bench.step()
    assert taken.refused == "the loss is nan in nll"
    assert taken.rows == [2]
    assert bench.bits() == before
    assert bench.step().refused is None  # and nothing of it lingers
    assert bench.bits() != before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_T5_a_non_finite_gradient_changes_no_bit_and_names_the_parameter(bench, bad):
    before = bench.bits()
    name, parameter = list(bench.model.named_parameters())[3]
    handle = parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), bad))
    taken = bench.step()
    handle.remove()
    assert taken.refused.startswith("the gradient norm is")
    assert taken.parameters == [name]
    assert bench.bits() == before


def test_T5_skipped_steps_are_counted_named_and_survived(tmp_path, monkeypatch, capsys):
    real = loop.gradient_step

    def sometimes(model, *args, **kwargs):
        with monkeypatch.context() as patch:
            if kwargs["noise"] in bad:
                poison_forward(patch, model, row=1)
            return real(model, *args, **kwargs)

    bad = {session.key(5, "noise", step).seed() for step in (2, 3)}
    monkeypatch.setattr(loop, "gradient_step", sometimes)
    run_dir = train(tiny_run(), tmp_path, quiet=True)
    events = [line for line in read_lines(run_dir / "metrics.jsonl") if line.get("event") == "skipped"]
    assert [(line["step"], line["rows"]) for line in events] == [(3, [1]), (4, [1])]
    assert "step 3: skipped: cause the loss is nan in nll" in capsys.readouterr().err
    summary = read_json(run_dir / "summary.json")
    assert (summary["status"], summary["steps"], summary["updates"], summary["skipped_steps"]) == ("complete", 6, 4, 2)
    losses = [line["loss"] for line in read_lines(run_dir / "metrics.jsonl") if "loss" in line]
    assert [loss is None for loss in losses] == [False, False, True, True, False, False]


def test_T5_too_many_skips_in_a_row_are_a_divergence(tmp_path, monkeypatch):
    real = loop.gradient_step

    def never(model, *args, **kwargs):
        with monkeypatch.context() as patch:
            poison_forward(patch, model, row=0)
            return real(model, *args, **kwargs)

    monkeypatch.setattr(loop, "gradient_step", never)
    run = tiny_run(steps=50, max_skips=3)
    run_dir = train(run, tmp_path, quiet=True)
    summary = read_json(run_dir / "summary.json")
    assert (summary["status"], summary["steps"], summary["updates"]) == ("diverged", 4, 0)
    assert summary["reason"] == "4 steps in a row without an update, the last because the loss is nan in nll"
    assert summary["final_loss"] is None
    assert load(run_dir).step == 4
    stamp = (run_dir / "summary.json").stat().st_mtime_ns
    assert train(run, tmp_path, quiet=True) == run_dir  # it would only diverge again
    assert (run_dir / "summary.json").stat().st_mtime_ns == stamp


def shuffled_at(monkeypatch, run: Run, at: int) -> None:
    """Random targets in one batch: a loss far above the usual once the model has learned."""
    real = Stream.batch

    def batch(self, step, rows, size):
        found = real(self, step, rows, size)
        if step != at:
            return found
        wrong = np.where(found.targets == IGNORE, IGNORE, (found.targets + 3) % self.tokenizer.vocab)
        return dataclasses.replace(found, targets=wrong)

    monkeypatch.setattr(Stream, "batch", batch)


@pytest.mark.parametrize("spike", [None, 2.0])
def test_T6_a_loss_spike_is_flagged_or_skipped_and_the_run_goes_on(tmp_path, monkeypatch, spike):
    fields = {"steps": 130, "batch": 16, "lr": 1e-2, "spike": spike, "log_every": 65}
    tree = tiny_run(model={"width": 32, "depth": 1}, **fields).tree()
    tree["data"]["sources"][0]["task"] = {"kind": "copy", "train": [1, 3], "iid": [3], "ood": [5]}
    run = Run.of(tree)
    shuffled_at(monkeypatch, run, at=120)
    run_dir = train(run, tmp_path, quiet=True)
    events = [line for line in read_lines(run_dir / "metrics.jsonl") if line.get("event")]
    assert [(line["step"], line["event"]) for line in events] == [(121, "skipped" if spike else "spike")]
    if spike:
        assert re.fullmatch(r"a spike: the loss of [\d.]+ exceeds [\d.]+", events[0]["cause"])
    else:
        assert events[0]["observed"] > events[0]["flagged_above"]
    summary = read_json(run_dir / "summary.json")
    assert (summary["status"], summary["skipped_steps"]) == ("complete", 1 if spike else 0)


def test_T7_a_parameter_that_gets_no_gradient_is_named_after_step_2(tmp_path, monkeypatch, capsys):
    real = session.build

    def with_dead_weight(run, vocab):
        model = real(run, vocab)
        model.core.forgotten = torch.nn.Parameter(torch.ones(3))
        return model

    monkeypatch.setattr(session, "build", with_dead_weight)
    run_dir = train(tiny_run(), tmp_path, quiet=True)
    events = [line for line in read_lines(run_dir / "metrics.jsonl") if line.get("event")]
    assert events == [{"step": 2, "event": "no_gradient", "parameters": ["core.forgotten"]}]
    assert "core.forgotten" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ARCHITECTURES.names())
def test_T8_accumulation_is_token_weighted(tmp_path, kind):
    """1 x 12 = 4 x 3 = 12 x 1, with unequal numbers of valid tokens and an empty micro-batch; noise on.

    All start from the same weights: an update of Adam's in between would turn the sign of a gradient that is rounding
    alone into a step of the learning rate.
    """
    noisy = {"dropout": 0.3} if "dropout" in ARCHITECTURES.get(kind).model_fields else {}
    bench = Bench(tiny_run(kind=kind, model=noisy, batch=12), tmp_path)
    batch, weights = bench.batch(), copy.deepcopy(bench.model.state_dict())
    targets = batch.targets.copy()
    targets[::3, 5:] = IGNORE
    targets[3:6] = IGNORE
    targets[7] = np.where(np.arange(32) < 9, targets[7], IGNORE)
    assert len({int((piece != IGNORE).sum()) for piece in np.split(targets, 4)}) == 4
    found = []
    for micro in (12, 3, 1):
        bench.model.load_state_dict(weights)
        bench.run = tiny_run(kind=kind, model=noisy, batch=12, micro=micro)
        taken = bench.step(dataclasses.replace(batch, targets=targets))
        found.append((taken, {name: p.grad for name, p in bench.model.named_parameters()}))
    whole, gradients = found[0]
    for taken, others in found[1:]:
        assert taken.supervised == whole.supervised
        assert taken.loss == pytest.approx(whole.loss, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)


def test_T9_nothing_supervised_is_no_update_and_no_nan(bench):
    before = bench.bits()
    batch = bench.batch()
    taken = bench.step(dataclasses.replace(batch, targets=np.full_like(batch.targets, IGNORE)))
    assert (taken.supervised, taken.refused) == (0, "no supervised token in the batch")
    assert bench.bits() == before


def test_T9_padding_rows_and_rows_of_one_token_weigh_nothing_and_break_nothing(bench):
    batch = bench.batch()
    tokens, targets = batch.tokens.copy(), batch.targets.copy()
    tokens[1], targets[1] = 0, IGNORE
    taken = bench.step(dataclasses.replace(batch, tokens=tokens, targets=targets))
    assert taken.refused is None
    assert math.isfinite(taken.loss)
    short = Batch(*(array[:, :1] for array in (tokens, np.maximum(tokens, 3), batch.documents)), batch.source)
    assert bench.step(short).refused is None


def test_T9_sequences_beyond_the_model_are_refused_before_there_is_a_directory(tmp_path):
    run = tiny_run(model={"positions": "learned", "max_positions": 4})
    with pytest.raises(UserError, match="learned positions"):
        train(run, tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs").exists()


DRIVER = """
import json, sys, time
from pathlib import Path
from stepladder.run import Run
from stepladder.train.session import train

def evaluate(model, tokenizer, run):
    print("evaluating", flush=True)
    time.sleep(float(sys.argv[3]))
    return {}

train(Run.of(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]), evaluate=evaluate, quiet=True)
"""


def start(tmp_path: Path, run: Run, pause: float = 0.0, **environment: str) -> subprocess.Popen[str]:
    config = tmp_path / f"{run.name}.json"
    config.write_text(json.dumps(run.tree()))
    command = [sys.executable, "-c", DRIVER, str(config), str(tmp_path / "runs"), str(pause)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **environment})


def test_T10_same_seed_same_bits_whatever_the_hash_seed(tmp_path):
    runs = [tiny_run(f"hash{hash_seed}", model={"dropout": 0.1}) for hash_seed in (1, 2)]
    processes = [start(tmp_path, run, PYTHONHASHSEED=run.name[-1]) for run in runs]
    found = []
    for run, process in zip(runs, processes, strict=True):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        found.append((latest_checkpoint(tmp_path / "runs" / run.name) / "model.safetensors").read_bytes())
    other = train(tiny_run("here", model={"dropout": 0.1}), tmp_path, quiet=True)
    assert found[0] == found[1] == (latest_checkpoint(other) / "model.safetensors").read_bytes()
    seed = train(tiny_run("seed", model={"dropout": 0.1}).model_copy(update={"seed": 6}), tmp_path, quiet=True)
    assert found[0] != (latest_checkpoint(seed) / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), r"2\.00 GiB\.$"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "can't allocate"),
    ],
    ids=["gpu", "cpu"],
)
def test_T11_running_out_of_memory_leaves_everything_as_it_was(tmp_path, monkeypatch, error, told):
    bench = Bench(tiny_run(micro=2), tmp_path)
    before, forward, calls = bench.bits(), bench.model.forward, []

    def second_fails(*args, **kwargs):
        calls.append(0)
        if len(calls) == 2:
            raise error
        return forward(*args, **kwargs)

    monkeypatch.setattr(bench.model, "forward", second_fails)
    with pytest.raises(OutOfMemory, match=told):
        bench.step()
    assert bench.bits() == before
    assert all(parameter.grad is None for parameter in bench.model.parameters())


def test_T12_sigterm_saves_and_exits_143(tmp_path):
    process = start(tmp_path, tiny_run(steps=10**6, eval_every=10))
    assert process.stdout.readline() == "evaluating\n"
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - asked < 10
    assert process.returncode == 143, errors
    assert re.fullmatch(r"stepladder: run: interrupted at step \d+; its checkpoint is safe\n", errors)
    summary = read_json(tmp_path / "runs/run/summary.json")
    assert summary["status"] == "interrupted"
    assert load(tmp_path / "runs/run").step == summary["steps"] >= 10


def test_T12_a_second_sigterm_exits_at_once(tmp_path):
    process = start(tmp_path, tiny_run(steps=10**6, eval_every=10), pause=60)
    assert process.stdout.readline() == "evaluating\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None  # it waits for the evaluation, to save after it
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert process.wait(timeout=10) == 143
    assert time.monotonic() - asked < 2
    process.communicate()


def test_T13_a_longer_budget_needs_consent_and_goes_on_at_the_final_rate(tmp_path):
    run_dir = train(tiny_run(), tmp_path, quiet=True)
    longer = tiny_run(steps=9)
    with pytest.raises(UserError, match=r"train.steps is 6 there and 9 here; give --extend .* or another name"):
        train(longer, tmp_path, quiet=True)
    assert read_json(run_dir / "summary.json")["steps"] == 6

    train(longer, tmp_path, quiet=True, extend=True)
    rates = [line["lr"] for line in read_lines(run_dir / "metrics.jsonl") if "lr" in line]
    final = learning_rate(longer.train, 1.0)
    assert len(rates) == 9
    assert rates[5:] == [final] * 4
    assert rates[4] > final
    summary = read_json(run_dir / "summary.json")
    assert (summary["steps"], summary["extended"]) == (9, {"steps": 9})
    assert summary["hash"] not in (tiny_run().hash(), longer.hash())  # neither the run nor a fresh one of 9 steps

    assert train(longer, tmp_path, quiet=True, extend=True) == run_dir  # done
    for other in (tiny_run(), tiny_run(steps=8)):
        with pytest.raises(UserError, match=r"was extended to train.steps=9"):
            train(other, tmp_path, quiet=True, extend=True)
    with pytest.raises(UserError, match=r"train.lr is .* there"):
        train(tiny_run(steps=12, lr=0.5), tmp_path, quiet=True, extend=True)


def test_T13_an_extension_that_is_interrupted_goes_on_as_one(tmp_path):
    def extended(name: str, stop: bool) -> Path:
        def evaluate(model, tokenizer, run):
            nonlocal stop
            if stop:
                stop = False
                signal.raise_signal(signal.SIGTERM)
            return {}

        train(tiny_run(name, eval_every=8), tmp_path, quiet=True)
        longer = tiny_run(name, eval_every=8, steps=10)
        if stop:
            with pytest.raises(session.Interrupted):
                train(longer, tmp_path, quiet=True, extend=True, evaluate=evaluate)
        return train(longer, tmp_path, quiet=True, extend=True, evaluate=evaluate)

    weights = [
        (latest_checkpoint(extended(name, stop)) / "model.safetensors").read_bytes()
        for name, stop in (("whole", False), ("cut", True))
    ]
    assert weights[0] == weights[1]


def test_C8_half_precision_of_the_wrong_sort_is_refused_by_path():
    with pytest.raises(UserError, match=r"train.precision = 'fp16'.*'fp32' or 'bf16'"):
        tiny_run(precision="fp16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_C8_a_missing_gpu_is_one_sentence_and_no_directory(tmp_path):
    with pytest.raises(UserError, match=r"train.device is 'cuda' but PyTorch sees no GPU"):
        train(tiny_run(device="cuda"), tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs").exists()


def test_C8_compiling_without_a_compiler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"train.compile needs a C\+\+ compiler"):
        train(tiny_run(compile=True), tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs").exists()


def test_C8_bf16_computes_in_bf16_and_keeps_masters_in_fp32(tmp_path):
    whole = Bench(tiny_run(), tmp_path).step()
    half = Bench(tiny_run(precision="bf16"), tmp_path)
    seen = []
    for module in half.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    taken = half.step()
    assert set(seen) == {torch.bfloat16}
    assert taken.loss != whole.loss
    assert taken.loss == pytest.approx(whole.loss, rel=2e-2)
    kept = {**named_weights(half.model), **optimizer_tensors(half.model, half.optimizer)}
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
