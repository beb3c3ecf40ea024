"""Measured memory is that of real calls: bytes saved and peaks on fake tensors against those of real ones."""

import resource
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

from stepladder.core.errors import UserError
from stepladder.data.stream import Batch
from stepladder.experiments.match import cost, sized
from stepladder.models.base import Part
from stepladder.models.lm import LanguageModel
from stepladder.models.zoo import ARCHITECTURES, Spec, spec
from stepladder.run import TrainConfig
from stepladder.train.loss import objective
from stepladder.train.memory import Live, decoding, training
from stepladder.train.optim import adamw
from stepladder.train.step import gradient_step

NAMES, FEW = ARCHITECTURES.names(), ["act", "ssm_mem", "transformer"]
VOCAB, ROWS, LENGTH, SHORT = 259, 2, 64, 37
FACTOR = 1.05
"""How far the measured peak may be from what torch's profiler sees allocated, kernels' own buffers included."""


def train(**fields):
    return TrainConfig(steps=1, **fields)


def zeros(length=LENGTH):
    return np.zeros((ROWS, length), np.int64)


def update(model, optimizer, config, length=LENGTH):
    nothing = zeros(length)
    gradient_step(model, optimizer, Batch(nothing, nothing, nothing, nothing[:, 0]), config, lr=1e-3, noise=0)


@cache
def short(name, **fields):
    """Measured once for all tests of an architecture: a fake update takes seconds where there are many operations."""
    return training(spec(name, "tiny"), VOCAB, ROWS, SHORT, train(**fields))


def allocated(call):
    """Peak of the bytes that torch allocates during a call, as its profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


@pytest.mark.parametrize(
    ("name", "fields"), [(name, {}) for name in NAMES] + [(name, {"precision": "bf16"}) for name in FEW], ids=str
)
def test_saved_bytes_are_those_that_a_real_forward_keeps_for_its_backward(name, fields):
    model = spec(name, "tiny").build(VOCAB)
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if all(storage.data_ptr() != p.untyped_storage().data_ptr() for p in model.parameters()):
            kept[StorageWeakRef(storage)] = storage.nbytes()
        return tensor

    tokens, targets, documents = (torch.from_numpy(zeros(SHORT)) for _ in range(3))
    autocast = torch.autocast("cpu", torch.bfloat16) if fields else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        output = model(tokens, targets=targets, documents=documents)
        loss, _ = objective(output, targets, {})
    alive = sum(size for storage, size in kept.items() if not storage.expired())
    assert loss.requires_grad  # the graph is there, and with it what it keeps; so is the output, as in training
    assert output.state is not None
    assert alive == short(name, **fields).saved


@pytest.mark.parametrize(
    ("name", "fields"),
    [(name, fields) for name in NAMES for fields in ({}, {"recompute": True, "precision": "bf16"})]
    + [(name, {"recompute": True, "micro": 1}) for name in FEW],
    ids=str,
)
def test_the_peak_of_a_fake_update_is_that_of_a_real_one(name, fields):
    config = train(**fields)
    with Live() as live:
        model = spec(name, "tiny").build(VOCAB)
        optimizer = adamw(model, config)
        update(model, optimizer, config, SHORT)
        optimizer.zero_grad()
        live.peak = live.now
        update(model, optimizer, config, SHORT)
    assert short(name, **fields).peak == live.peak


@pytest.mark.parametrize("name", ["act", "ssm_mem", "transformer"])
def test_the_profiler_sees_the_same_peak_of_an_update(name):
    model = spec(name, "tiny").build(VOCAB)
    optimizer = adamw(model, train())
    update(model, optimizer, train())
    optimizer.zero_grad()
    weights = 4 * sum(p.numel() for p in model.parameters())
    peak = 3 * weights + allocated(lambda: update(model, optimizer, train()))  # weights and moments are there before
    measured = training(spec(name, "tiny"), VOCAB, ROWS, LENGTH, train()).peak
    assert peak / FACTOR < measured < peak * FACTOR
    assert measured > 1.5 * 4 * weights


@pytest.mark.parametrize("name", NAMES)
def test_decoding_carries_the_state_that_the_architecture_declares(name):
    declared = cost(spec(name, "tiny"), VOCAB, SHORT)
    measured = decoding(spec(name, "tiny"), VOCAB, ROWS, SHORT)
    assert measured.state == pytest.approx(ROWS * declared.state_bytes, rel=0.02)
    assert measured.peak > measured.state + 4 * declared.params


@pytest.mark.parametrize("name", ["act", "ssm_mem", "transformer"])
def test_the_profiler_sees_the_same_peak_of_decoding(name):
    model = spec(name, "tiny").build(VOCAB).eval()
    tokens = torch.from_numpy(zeros())

    def decode():
        with torch.no_grad():
            state = model.init_state(ROWS, LENGTH)
            state = model(tokens[:, :-1], state, logits_at="last").state
            model(tokens[:, -1:], state, logits_at="last")

    peak = 4 * sum(p.numel() for p in model.parameters()) + allocated(decode)
    assert peak / FACTOR < decoding(spec(name, "tiny"), VOCAB, ROWS, LENGTH).peak < peak * FACTOR


def test_twice_the_rows_save_twice_as_much():
    saved = [training(spec("act", "tiny"), VOCAB, rows, LENGTH, train()).saved for rows in (4, 8)]
    assert saved[1] == pytest.approx(2 * saved[0], rel=0.01)


def test_ticks_are_those_asked_for():
    ticks = [training(spec("shared_loop", "tiny"), VOCAB, 1, LENGTH, train(), ticks).saved for ticks in (3, 6)]
    assert ticks[0] == training(spec("shared_loop", "tiny"), VOCAB, 1, LENGTH, train()).saved
    assert ticks[1] > 1.5 * ticks[0]
    states = [decoding(spec("shared_loop", "tiny"), VOCAB, 1, LENGTH, ticks).state for ticks in (3, 6)]
    assert states[1] == pytest.approx(2 * states[0], rel=0.01)
    with pytest.raises(UserError, match="no loop"):
        training(spec("transformer", "tiny"), VOCAB, 1, LENGTH, train(), 2)


def test_the_largest_size_is_measured_without_allocating_it():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    generator = torch.get_rng_state()
    large = sized("transformer", "1B-16k", 32768)
    assert training(large, 32768, 8, 16384, train(precision="bf16")).peak > 2**37
    assert decoding(large, 32768, 8, 16384).state == pytest.approx(8 * 16384 * 2 * 512 * 18 * 4, rel=0.01)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_context_beyond_the_learned_positions_is_refused():
    short = spec("nano_absolute", "tiny", max_positions=32)
    assert training(short, VOCAB, 1, 32, train()).peak
    for measure in (lambda: training(short, VOCAB, 1, 33, train()), lambda: decoding(short, VOCAB, 1, 33)):
        with pytest.raises(UserError, match="context of 33 does not fit the 32 learned positions"):
            measure()


def test_shapes_that_depend_on_numbers_are_refused_in_a_sentence():
    class Picky(Part):
        def forward(self, x_BTD, state, ctx):
            return x_BTD.index_put((ctx.positions_BT > 3,), x_BTD[x_BTD.sum(-1) > 0].mean()), state

    class Odd(Spec):
        def build(self, vocab):
            return LanguageModel(vocab, 8, Picky())

    with pytest.raises(UserError, match="its shapes depend on numbers"):
        training(Odd(), VOCAB, 1, 8, train())


def test_bytes_live_as_long_as_the_last_view_of_their_storage():
    with Live() as live:
        whole = torch.empty(1000, dtype=torch.float32)
        half = whole[::2]
        more = torch.empty(10, dtype=torch.int64)
        assert live.now == live.peak == 4080
        del whole
        assert live.now == 4080
        del half, more
        other = torch.empty(5, dtype=torch.uint8)
        assert (live.now, live.peak) == (5, 4080)
        live.keep(other)
        live.keep(other[1:])
        live.keep(torch.empty(3, dtype=torch.uint8))
        assert (live.now, live.saved) == (5, 8)
