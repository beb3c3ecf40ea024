"""What training needs of an architecture: a sane start, gradients everywhere, and exact resumption."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch

from stepladder.data.stream import Batch
from stepladder.laws.law import Subject, Violation, law
from stepladder.laws.measure import Meter
from stepladder.models.base import State, leaves, map_state
from stepladder.models.lm import LanguageModel
from stepladder.models.weights import load_tensors, save_tensors
from stepladder.run import TrainConfig
from stepladder.train.checkpoint import restore, save
from stepladder.train.loss import objective
from stepladder.train.optim import adamw, optimizer_tensors
from stepladder.train.step import gradient_step

ROWS, LENGTH = 4, 32
"""The training length that the laws stand for."""


def _batch(subject: Subject, step: int) -> Batch:
    """Packed rows of random tokens: what a step of training is given."""
    stream = subject.tokens(ROWS, LENGTH + 1, "training", step).numpy()
    documents = subject.documents(ROWS, LENGTH).numpy()
    return Batch(stream[:, :-1], stream[:, 1:], documents, documents[:, 0])


@law("reach", says="every parameter receives a finite gradient that is not zero within 5 batches")
def reach(subject: Subject) -> str:
    """From the likelihood and the named losses together, with 5 real updates, so that gates may open first."""
    model, train = subject.build(torch.float32, **subject.noisy).train(), TrainConfig(steps=5)
    optimizer = adamw(model, train)
    missing = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    count = len(missing)
    for step in range(5):
        taken = gradient_step(model, optimizer, _batch(subject, step), train, lr=1e-2, noise=step)
        if taken.refused:
            names = ": " + ", ".join(taken.parameters[:5]) if taken.parameters else ""
            raise Violation(f"batch {step + 1} gives no update, {taken.refused}{names}")
        missing -= {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    if missing:
        shown = ", ".join(sorted(missing)[:5]) + (", ..." if len(missing) > 5 else "")
        raise Violation(f"{len(missing)} of {count} parameters get no gradient in 5 batches: {shown}")
    return f"{count} parameters reached"


@law("start", says="the first loss is within 10 % of ln V, and finite at 4 x training length and 4 x ticks")
def start(subject: Subject) -> str:
    """In float32, where overflow happens; at two vocabularies, as scales that hide at V = 23 show at 257."""
    worst = 0.0
    for vocab in (subject.vocab, 257):
        model = subject.build(torch.float32, vocab=vocab)
        for length in (LENGTH, 4 * LENGTH):
            stream = subject.tokens(ROWS, length + 1, "start", vocab=vocab)
            with torch.no_grad():
                loss = float(model(stream[:, :-1], targets=stream[:, 1:]).nll_BT.mean())
            off = loss / math.log(vocab) - 1
            if not math.isfinite(loss) or (length == LENGTH and abs(off) > 0.1):
                raise Violation(
                    f"the first loss is {loss:.3f} nats at length {length}; ln {vocab} = {math.log(vocab):.3f}"
                )
            worst = max(worst, abs(off)) if length == LENGTH else worst
    own = subject.ticks
    model = subject.build(torch.float32, **subject.noisy).train()
    for ticks in (None,) if own is None else (None, 4 * own):
        stream = subject.tokens(ROWS, 4 * LENGTH + 1, "start")
        model.zero_grad()
        total, terms = objective(model(stream[:, :-1], targets=stream[:, 1:], ticks=ticks), stream[:, 1:], {})
        total.backward()
        for name, value in terms.items():
            if not math.isfinite(float(value)):
                raise Violation(f"{name} is {float(value)} at length {4 * LENGTH}, ticks={ticks}")
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                raise Violation(f"the gradient of {name} is not finite at length {4 * LENGTH}, ticks={ticks}")
    return f"first loss within {worst:.1%} of ln V; finite at length {4 * LENGTH}" + (
        f", {4 * own} ticks" if own else ""
    )


HALF = 3
"""Steps before and after the save."""


def _train(subject: Subject, model: LanguageModel, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    train = TrainConfig(steps=2 * HALF)
    return [gradient_step(model, optimizer, _batch(subject, step), train, lr=1e-2, noise=step).loss for step in steps]


def save_state(state: State, path: Path) -> None:
    """Write the leaves of a sequence state to a safetensors file."""
    save_tensors({f"{place:04d}": leaf.clone() for place, leaf in enumerate(leaves(state))}, path)


def load_state(like: State, path: Path) -> State:
    """The state saved at ``path``, in the tree of ``like``."""
    found = iter(sorted(load_tensors(path).items()))
    return map_state(lambda _: next(found)[1], like)


@law("resume", says="2N steps = N + save + load + N, bit for bit on a CPU, carried states and memories included")
def resume(subject: Subject) -> str:
    """In float32 with stochastic parts on. What goes on after the save is a model built from another seed.

    A sequence begun before the save goes on after it from its state alone: growing, preallocated, and packed.
    """
    meter = Meter()
    models = [subject.build(torch.float32, seed, **subject.noisy).train() for seed in (0, 0, 1)]
    optimizers = [adamw(model, TrainConfig(steps=2 * HALF)) for model in models]
    whole = _train(subject, models[0], optimizers[0], range(2 * HALF))
    losses = _train(subject, models[1], optimizers[1], range(HALF))
    tokens, keys = subject.tokens(ROWS, LENGTH, "resume"), subject.keys(ROWS)
    first, rest = tokens[:, :9], tokens[:, 9:]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        home = Path(folder)
        restore(save(home, HALF, models[1], optimizers[1], {}, keep=1), models[2], optimizers[2])
        for how, begun in {
            "growing": models[1](first, key=keys).state,
            "preallocated": models[1](first, models[1].init_state(ROWS, LENGTH, key=keys)).state,
            "packed": models[1](first, documents=subject.documents(ROWS, 9), key=keys).state,
        }.items():
            save_state(begun, home / "sequences.safetensors")
            want, got = models[1](rest, begun), models[2](rest, load_state(begun, home / "sequences.safetensors"))
            where = f"a sequence continued after save and load, {how} state"
            meter.equal({"logits": got.logits}, {"logits": want.logits}, where)
            meter.states(got.state, want.state, where, bound=0.0, strict=True)
    losses += _train(subject, models[2], optimizers[2], range(HALF, 2 * HALF))
    if losses != whole:
        step = next(step for step in range(2 * HALF) if losses[step] != whole[step])
        raise Violation(f"the loss of step {step + 1} is {losses[step]!r}, uninterrupted {whole[step]!r}")
    where = f"after {HALF} + {HALF} steps, against {2 * HALF}"
    meter.equal(dict(models[2].state_dict()), dict(models[0].state_dict()), where)
    resumed, straight = (optimizer_tensors(models[i], optimizers[i]) for i in (2, 0))
    meter.equal(resumed, straight, where)
    return f"{2 * HALF} steps, {meter.count} tensors equal bit for bit"
