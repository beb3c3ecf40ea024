"""Faults around checkpoints: kills at every file operation, full disks, flipped bits, hostile files, exact resume."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from stepladder.core.errors import UserError
from stepladder.core.files import Corrupt, read_json, read_lines, write_manifest
from stepladder.models.weights import load_tensors, load_weights, named_weights, save_weights
from stepladder.models.zoo import ARCHITECTURES
from stepladder.run import Run, checkpoints, latest_checkpoint, load
from stepladder.train import checkpoint
from stepladder.train.optim import adamw
from stepladder.train.session import Interrupted, build, train

CLOCK = ("seconds", "tokens_per_s")


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
            "train": {"device": "cpu", "steps": 6, "batch": 4, "save_every": 2, "log_every": 1, **fields},
        }
    )


def results(run_dir: Path) -> tuple[bytes, bytes, list[dict]]:
    """What must be equal: weights, optimizer, metric lines without the clock."""
    last = latest_checkpoint(run_dir)
    lines = [{k: v for k, v in line.items() if k not in CLOCK} for line in read_lines(run_dir / "metrics.jsonl")]
    return (last / "model.safetensors").read_bytes(), (last / "optimizer.safetensors").read_bytes(), lines


# A child that dies at its n-th file operation, for every n. Forked from a process of its own that has one thread.
KILLER = """
import os, signal, sys, torch
from pathlib import Path
from stepladder.models.zoo import spec
from stepladder.run import checkpoints, latest_checkpoint
from stepladder.models.weights import load_weights, named_weights
from stepladder.train import checkpoint
from stepladder.train.optim import adamw
from stepladder.run import TrainConfig

torch.set_num_threads(1)
os.fsync = lambda handle: None  # a kill, unlike a power cut, loses nothing that was written; and it is slow
root, keep = Path(sys.argv[1]), int(sys.argv[2])
model = spec("identity", "tiny").build(8)
optimizer = adamw(model, TrainConfig(steps=1))

def write(run_dir, step):
    with torch.no_grad():
        for tensor in named_weights(model).values():
            tensor.fill_(step)
    return checkpoint.save(run_dir, step, model, optimizer, {}, keep)

def die_at(count):
    def wrap(function):
        def counted(*args, **kwargs):
            nonlocal count
            count -= 1
            if count < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return counted
    for name in ("write", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir"):
        setattr(os, name, wrap(getattr(os, name)))

point = 0
while True:
    run_dir = root / str(point)
    for step in (1, 2, 3):
        write(run_dir, step)
    child = os.fork()
    if not child:
        die_at(point)
        write(run_dir, 4)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    newest = latest_checkpoint(run_dir)
    load_weights(model, newest / "model.safetensors")
    values = {float(t.detach().flatten()[0]) for t in named_weights(model).values()}
    assert newest.name in ("step-00000003", "step-00000004"), (point, newest)
    assert values == {float(newest.name[-1])}, (point, values)
    if code == 0:
        assert newest.name == "step-00000004"
    else:
        assert code == -signal.SIGKILL
    write(run_dir, 5)
    left = sorted(os.listdir(run_dir / "checkpoints"))
    assert len(left) == min(keep, 3) and left[-1] == "step-00000005", (point, left)
    if code == 0:
        break
    point += 1
print(point)
"""


@pytest.mark.parametrize("keep", [1, 2], ids=["K11-keep1", "K1-keep2"])
def test_K1_K11_killed_at_every_file_operation_of_a_save(tmp_path, keep):
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), str(keep)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # a killed save is nothing flawed, so there is nothing to warn of
    assert int(done.stdout) > 20  # that many operations were cut short


SAVER = """
import sys, torch
from pathlib import Path
from stepladder.models.zoo import spec
from stepladder.run import TrainConfig
from stepladder.train import checkpoint
from stepladder.train.optim import adamw
import os, random, signal, time
from stepladder.run import latest_checkpoint

torch.set_num_threads(1)
model = spec("transformer", "tiny").build(50)
optimizer = adamw(model, TrainConfig(steps=1))
root, chance = Path(sys.argv[1]), random.Random(0)
checkpoint.save(root, 1, model, optimizer, {}, 2)
for life in range(500):
    before = int(latest_checkpoint(root).name[5:])
    child = os.fork()
    if not child:
        while True:
            before += 1
            checkpoint.save(root, before, model, optimizer, {}, 2)
    time.sleep(chance.uniform(0, 0.04))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert int(latest_checkpoint(root).name[5:]) >= before
print("sound", latest_checkpoint(root).name)
"""


@pytest.mark.slow
def test_K1_killed_at_500_random_instants(tmp_path):
    done = subprocess.run([sys.executable, "-c", SAVER, str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sound")
    assert done.stderr == ""


def failing(monkeypatch, name, code, folder):
    """Let an os function fail with ``code`` while a checkpoint of ``folder`` is written; returns the switch."""
    real, switch = getattr(os, name), {"on": True, "hits": 0}

    def patched(first, *args, **kwargs):
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
        if switch["on"] and folder in path:
            switch["hits"] += 1
            raise OSError(code, os.strerror(code), path)
        return real(first, *args, **kwargs)

    monkeypatch.setattr(os, name, patched)
    return switch


DISK = [("write", errno.ENOSPC), ("fsync", errno.EIO), ("mkdir", errno.EROFS)]


@pytest.mark.parametrize(("name", "code"), DISK, ids=["ENOSPC", "EIO", "EROFS"])
def test_K2_a_failing_disk_leaves_old_checkpoints_and_the_run_goes_on(tmp_path, monkeypatch, capsys, name, code):
    train(tiny_run("whole"), tmp_path, quiet=True)
    real = checkpoint.save

    def save(run_dir, step, *rest):
        if step != 4:
            return real(run_dir, step, *rest)
        with monkeypatch.context() as patch:
            failing(patch, name, code, "/.unfinished-")
            return real(run_dir, step, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    run_dir = train(tiny_run("cut"), tmp_path, quiet=True)
    assert [path.name for path in checkpoints(run_dir)] == ["step-00000002", "step-00000006"]
    assert re.search(r"warning: the checkpoint of step 4 could not be written .*goes on", capsys.readouterr().err)
    assert results(run_dir) == results(tmp_path / "whole")
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_K2_a_disk_that_stays_full_ends_in_one_sentence_and_room_mends_it(tmp_path, monkeypatch):
    train(tiny_run("whole"), tmp_path, quiet=True)
    switch = failing(monkeypatch, "write", errno.ENOSPC, "/cut/")
    switch["on"] = False

    def fill_up(model, tokenizer, run):
        switch["on"] = True
        return {}

    with pytest.raises(UserError, match=r"cannot be written .*No space left.*same command again"):
        train(tiny_run("cut", eval_every=5), tmp_path, quiet=True, evaluate=fill_up)
    assert latest_checkpoint(tmp_path / "cut").name == "step-00000004"
    assert switch["hits"]
    switch["on"] = False
    train(tiny_run("cut", eval_every=5), tmp_path, quiet=True)
    assert results(tmp_path / "cut")[:2] == results(tmp_path / "whole")[:2]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("where", [0.02, 0.7])
def test_K3_one_flipped_bit_is_found_and_the_one_before_is_used(tmp_path, capsys, file, where):
    run_dir = train(tiny_run(), tmp_path, quiet=True)
    before = results(run_dir)
    flip(run_dir / "checkpoints/step-00000006" / file, where)
    assert latest_checkpoint(run_dir).name == "step-00000004"
    assert "step-00000006" in capsys.readouterr().err
    with pytest.raises(Corrupt):
        load(run_dir, 6)

    (run_dir / "summary.json").unlink()  # as if the run had been killed here: it goes on from step 4
    train(tiny_run(), tmp_path, quiet=True)
    assert "set aside" in capsys.readouterr().err
    assert results(run_dir) == before


def test_K3_no_sound_checkpoint_is_an_error_and_not_a_new_beginning(tmp_path):
    run_dir = train(tiny_run(keep=1), tmp_path, quiet=True)
    flip(run_dir / "checkpoints/step-00000006/model.safetensors", 0.5)
    (run_dir / "summary.json").unlink()
    with pytest.raises(UserError, match=r"none of the 1 checkpoints .* is sound"):
        train(tiny_run(keep=1), tmp_path, quiet=True)


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 4
    path.write_bytes(data)


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_K4_pickles_are_not_opened_whatever_they_are_called(tmp_path):
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Bomb(canary))
    run_dir = train(tiny_run(), tmp_path, quiet=True)
    folder = run_dir / "checkpoints/step-00000006"
    (tmp_path / "bomb").write_bytes(bomb)
    with tarfile.open(tmp_path / "bomb.tar", "w") as tar:
        tar.add(tmp_path / "bomb", "model.safetensors")
    (folder / "model.pt").write_bytes(bomb)
    (folder / ".metadata").write_bytes(bomb)
    for payload in (bomb, (tmp_path / "bomb.tar").read_bytes()):
        (folder / "model.safetensors").write_bytes(payload)
        write_manifest(folder)  # even if the checksum was made to fit
        with pytest.raises(Corrupt, match="safetensors"):
            load(run_dir, 6)
        (run_dir / "summary.json").unlink(missing_ok=True)
        with pytest.raises(Corrupt, match="safetensors"):
            train(tiny_run(), tmp_path, quiet=True)
    assert not canary.exists()
    pickle.loads(bomb)
    assert canary.exists()  # the bomb does go off where it is opened


def crafted(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def header(**entries) -> bytes:
    return json.dumps(entries).encode()


HOSTILE = {
    "empty": b"",
    "short": b"\0\0\0",
    "2^60 header": crafted(b"{}", length=2**60),
    "2^64-1 header": crafted(b"{}", length=2**64 - 1),
    "header beyond the file": crafted(header(w=entry()), bytes(8), length=4096),
    "not JSON": crafted(b"\x80\x04abc"),
    "a list": crafted(b"[1, 2]"),
    "nested": crafted(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "overlapping": crafted(header(a=entry(), b=entry(offsets=(4, 12))), bytes(12)),
    "gap": crafted(header(a=entry(), b=entry(offsets=(12, 20))), bytes(20)),
    "out of range": crafted(header(w=entry(offsets=(0, 2**40), shape=(2**38,))), bytes(8)),
    "negative": crafted(header(w=entry(offsets=(0, -8))), bytes(8)),
    "too few bytes": crafted(header(w=entry(shape=(4,), offsets=(0, 16))), bytes(8)),
    "too many bytes": crafted(header(w=entry()), bytes(24)),
    "shape and size differ": crafted(header(w=entry(shape=(2**30, 2**30))), bytes(8)),
    "shape overflows": crafted(header(w=entry(shape=(2**63, 2**63))), bytes(8)),
    "unknown type": crafted(header(w=entry(dtype="F33")), bytes(8)),
    "type of another size": crafted(header(w=entry(dtype="F64")), bytes(8)),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_K5_hostile_tensor_files_are_refused_before_memory_is_taken(tmp_path, data):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_kib()
    with pytest.raises(Corrupt, match=str(path)):
        load_tensors(path)
    assert peak_kib() - before < 64 * 1024


def test_K5_a_sound_file_of_another_type_is_refused_by_name(tmp_path):
    model = build(tiny_run(), 40)
    wide = {name: tensor.detach().double() for name, tensor in named_weights(model).items()}
    (tmp_path / "wide.safetensors").write_bytes(save(wide))
    with pytest.raises(UserError, match=r"reshaped embed.tokens.weight: file .* float64, model .* float32"):
        load_weights(model, tmp_path / "wide.safetensors")


def peak_kib() -> int:
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def test_K6_missing_extra_and_reshaped_tensors_are_listed(tmp_path):
    model = build(tiny_run(), 40)
    before = {name: tensor.detach().clone() for name, tensor in named_weights(model).items()}
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    names = list(tensors)
    tensors["new.weight"] = tensors.pop(names[1])
    tensors[names[2]] = torch.zeros(3)
    path = tmp_path / "other.safetensors"
    path.write_bytes(save(tensors))
    with pytest.raises(UserError) as refusal:
        load_weights(model, path)
    for words in (f"missing {names[1]}", "extra new.weight", f"reshaped {names[2]}: file (3,)"):
        assert words in str(refusal.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in named_weights(model).items())

    misfits = load_weights(model, path, strict=False)
    assert len(misfits) == 3
    after = named_weights(model)
    assert torch.equal(after[names[0]], before[names[0]] + 1)
    assert torch.equal(after[names[1]], before[names[1]])
    assert torch.equal(after[names[2]], before[names[2]])


def test_K7_without_optimizer_state_exact_resume_is_refused(tmp_path):
    run_dir = train(tiny_run(), tmp_path, quiet=True)
    (run_dir / "summary.json").unlink()
    for path in checkpoints(run_dir):
        (path / "optimizer.safetensors").unlink()
        write_manifest(path)  # somebody kept the weights alone, on purpose
    with pytest.raises(UserError, match=r"no optimizer state.*weights alone"):
        train(tiny_run(), tmp_path, quiet=True)
    assert load(run_dir).step == 6  # weights only, asked for


def mixed_run(name, kind) -> Run:
    """A run with everything that could make a resumed one differ: noise, a ramp, a moving mixture, accumulation."""
    fields = ARCHITECTURES.get(kind)
    noisy = {"dropout": 0.2} if "dropout" in fields.model_fields else {}
    tree = tiny_run(name, kind, noisy, micro=2, log_every=3, eval_every=3, clip=0.1).tree()
    tree["data"] = {
        "sequence": 32,
        "sources": [
            {"kind": "task", "task": "parity", "ramp": 4, "weight": [[0, 1.0], [6, 0.2]]},
            {"kind": "text", "path": "pydoc"},
        ],
    }
    return Run.of(tree)


@pytest.mark.parametrize("kind", ARCHITECTURES.names())
def test_K8_resume_is_bitwise(tmp_path, kind):
    def calm(model, tokenizer, run):
        return {"figure": 1.0}

    def asked_to_stop(model, tokenizer, run):
        signal.raise_signal(signal.SIGTERM)
        return {"figure": 1.0}

    def crash(model, tokenizer, run):
        raise ZeroDivisionError

    whole = train(mixed_run("whole", kind), tmp_path, evaluate=calm, quiet=True)
    with pytest.raises(Interrupted) as stopped:
        train(mixed_run("cut", kind), tmp_path, evaluate=asked_to_stop, quiet=True)
    assert stopped.value.code == 143
    assert latest_checkpoint(tmp_path / "cut").name == "step-00000003"
    with pytest.raises(ZeroDivisionError):  # dies in the evaluation of step 6, which is saved before it
        train(mixed_run("cut", kind), tmp_path, evaluate=crash, quiet=True)
    assert read_json(tmp_path / "cut/summary.json")["status"] == "failed"
    assert latest_checkpoint(tmp_path / "cut").name == "step-00000006"
    cut = train(mixed_run("cut", kind), tmp_path, evaluate=calm, quiet=True)
    assert results(cut) == results(whole)
    for field in ("steps", "tokens", "supervised", "final_loss", "train_flops", "status", "hash"):
        assert read_json(cut / "summary.json")[field] == read_json(whole / "summary.json")[field]


def test_K10_another_version_of_a_checkpoint_is_refused_naming_both(tmp_path):
    run_dir = train(tiny_run(), tmp_path, quiet=True)
    folder = run_dir / "checkpoints/step-00000006"
    state = read_json(folder / "state.json")
    (folder / "state.json").write_text(json.dumps({**state, "schema": 7}))
    write_manifest(folder)
    with pytest.raises(UserError, match=r"version 7.*version 1"):
        load(run_dir)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    one, two = train(tiny_run("one"), tmp_path, quiet=True), train(tiny_run("two", lr=0.5), tmp_path, quiet=True)
    (two / "summary.json").unlink()
    shutil.rmtree(two / "checkpoints")
    shutil.copytree(one / "checkpoints", two / "checkpoints")
    with pytest.raises(UserError, match="belongs to another run"):
        train(tiny_run("two", lr=0.5), tmp_path, quiet=True)


def test_weights_survive_a_round_trip_bit_by_bit(tmp_path):
    run = tiny_run()
    model, other = build(run, 40), build(run.model_copy(update={"seed": 6}), 40)
    optimizer = adamw(model, run.train)
    for tensor in model.parameters():
        tensor.grad = torch.from_numpy(np.random.default_rng(0).normal(size=tensor.shape)).float()
    optimizer.step()
    path = checkpoint.save(tmp_path, 1, model, optimizer, {"run": "x"}, 1)
    copy = adamw(other, run.train)
    assert checkpoint.restore(path, other, copy) == {"run": "x"}
    save_weights(other, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        for name, value in optimizer.state[mine].items():
            assert torch.equal(value, copy.state[theirs][name])
