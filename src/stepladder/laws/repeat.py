"""One function, one result: the same seed gives the same bits, and every faster path gives the plain path's result."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stepladder.laws.law import Subject, Violation, law
from stepladder.laws.measure import Meter
from stepladder.models.base import Output, detach_state
from stepladder.models.heads import softmax
from stepladder.models.lm import LanguageModel
from stepladder.models.spec import Spec

ROWS, LENGTH = 3, 19

Results = dict[str, Tensor]


def run(
    model: LanguageModel, tokens: Tensor, targets: Tensor, between: Callable[[], None] = lambda: None, **call: Any
) -> tuple[Results, Output]:
    """Likelihood, losses, logits and the gradient of every parameter; ``between`` runs before the backward pass."""
    model.zero_grad(set_to_none=True)
    out = model(tokens, targets=targets, **call)
    total = out.nll_BT.sum() + sum(value.sum() for value in out.losses.values())
    between()
    total.backward()
    with torch.no_grad():
        logits = model(tokens, **call).logits
    results = {"logits": logits, "nll": out.nll_BT.detach()}
    results.update({f"loss '{name}'": value.detach() for name, value in out.losses.items()})
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        results[f"gradient of {name}"] = grad
    return results, out


def _global_random_states() -> list[Any]:
    return [torch.random.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state(legacy=False))]


def _disturb(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@contextmanager
def _global_random_numbers_restored() -> Iterator[None]:
    torch_state, state, numpy_state = torch.random.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(torch_state)
        random.setstate(state)
        np.random.set_state(numpy_state)


@law(
    "repeat",
    says="same seed, same bits; randomness comes from the call's key only, also when activations are recomputed",
)
def repeat(subject: Subject) -> str:
    """Weights, results and gradients in train mode with stochastic parts on; forward leaves no trace on the model."""
    meter, keys = Meter(), subject.keys(ROWS)
    tokens, targets = (subject.tokens(ROWS, LENGTH, "repeat", name) for name in ("tokens", "targets"))
    with _global_random_numbers_restored():
        for train in (True, False):
            model, twin = (subject.build(stir=0.1, **subject.noisy).train(train) for _ in range(2))
            meter.equal(dict(model.state_dict()), dict(twin.state_dict()), "weights built twice from one seed")
            before = {name: value.clone() for name, value in model.state_dict().items()}
            how = "train mode" if train else "eval mode"

            _disturb(1)
            states = _global_random_states()
            first = run(model, tokens, targets, key=keys)[0]
            if states != _global_random_states():
                raise Violation(f"forward or backward draws from a global random generator ({how})")
            run(model, targets, tokens, key=keys + 1, ticks=None)
            _disturb(2)
            again = run(model, tokens, targets, key=keys)[0]
            meter.equal(again, first, f"after another batch and another global seed, {how}")
            meter.equal(dict(model.state_dict()), before, f"weights and buffers before and after use, {how}")
            meter.equal(run(twin, tokens, targets, key=keys)[0], first, f"a second model of the same seed, {how}")

            # Equal operations in equal order; a fused backward may still accumulate in another order: 1e-12.
            recomputed = run(model, tokens, targets, lambda: _disturb(3), key=keys, recompute=True)[0]
            meter.close(recomputed, first, f"recomputed activations with stochastic parts on, {how}", bound=1e-12)
        if subject.noisy:
            noisy = subject.build(stir=0.1, **subject.noisy).train()
            other, same = (run(noisy, tokens, targets, key=keys + shift)[0]["nll"] for shift in (1, 0))
            if torch.equal(other, same):
                raise Violation("another key gives the same dropout: the key is ignored")
    return meter.summary()


def _same(
    subject: Subject, meter: Meter, where: str, plain: dict[str, Any], fast: dict[str, Any], **build: Any
) -> None:
    """Two ways to call one model agree in outputs, gradients and final state, at lengths around powers of two."""
    model = subject.build(stir=0.1, **build).train()
    for length in (1, 2, 63, 64, 65):
        tokens, targets = (subject.tokens(ROWS, length, "twin", name) for name in ("tokens", "targets"))
        call: dict[str, Any] = {"key": subject.keys(ROWS)}
        ways = [
            {name: value(model, tokens) if callable(value) else value for name, value in way.items()}
            for way in (plain, fast)
        ]
        (want, out), (got, other) = (
            run(model, tokens, targets, **({} if "state" in way else call), **way) for way in ways
        )
        meter.close(got, want, f"{where}, length {length}")
        # The id of a document that was never named is -1: bookkeeping, not part of the function.
        strict, but = "state" not in fast, ("document_B",) if "documents" in plain else ()
        meter.states(other.state, out.state, f"{where}, length {length}", strict=strict, but=but)


@contextmanager
def _small_likelihood_chunks() -> Iterator[None]:
    before = softmax.CHUNK
    softmax.CHUNK = 5 * Subject.vocab
    try:
        yield
    finally:
        softmax.CHUNK = before


def _declared_twins(subject: Subject, meter: Meter) -> int:
    """Other implementations that the spec names must compute the same function of the same parameters."""
    for fields in subject.spec.twins:
        plain, fast = (subject.build(stir=0.1, **subject.noisy, **extra).train() for extra in ({}, fields))
        fast.load_state_dict(plain.state_dict())
        for length in (1, 2, 63, 64, 65):
            tokens, targets = (subject.tokens(ROWS, length, "twin", name) for name in ("tokens", "targets"))
            for documents in (None, subject.documents(ROWS, length)):
                call: dict[str, Any] = {"documents": documents, "key": subject.keys(ROWS)}
                (want, out), (got, other) = (run(model, tokens, targets, **call) for model in (plain, fast))
                where = f"twin {fields}, {'one document' if documents is None else 'packed'}, length {length}"
                meter.close(got, want, where)
                meter.states(other.state, out.state, where, strict=True)
                rest = [
                    run(m, tokens, targets, state=detach_state(o.state))[0] for m, o in ((plain, out), (fast, other))
                ]
                meter.close(rest[1], rest[0], f"{where}, continued")
    return len(subject.spec.twins)


def _head_is_one_distribution(subject: Subject, meter: Meter) -> None:
    """The likelihood is that of the logits, and logits asked for at some positions are those of all positions."""
    tokens, targets = (subject.tokens(ROWS, LENGTH, "twin", name) for name in ("tokens", "targets"))
    mask = torch.arange(LENGTH) % (2 + torch.arange(ROWS)[:, None]) == 0
    model = subject.build(stir=0.1)
    with torch.no_grad():
        every = model(tokens).logits
        found = {
            "logits_at='last'": model(tokens, logits_at="last").logits,
            "logits_at=mask": model(tokens, logits_at=mask).logits,
            "nll": model(tokens, targets=targets).nll_BT,
        }
    nll = F.cross_entropy(every.transpose(1, 2), targets, reduction="none")
    want = {"logits_at='last'": every[:, -1:], "logits_at=mask": every[mask], "nll": nll}
    meter.close(found, want, "against all logits and their softmax")


@law("twin", says="every fast path equals the plain path in outputs, gradients and final state")
def twin(subject: Subject) -> str:
    """Recomputation, plain causal masks, preallocated states, parts of the head, and the spec's own twins."""
    meter = Meter()
    _head_is_one_distribution(subject, meter)
    _same(subject, meter, "recomputed activations", {}, {"recompute": True}, **subject.noisy)
    _same(subject, meter, "documents left out", {"documents": lambda _, x: torch.zeros_like(x)}, {})

    def ready(model: LanguageModel, tokens: Tensor) -> Any:
        return model.init_state(ROWS, tokens.shape[1], key=subject.keys(ROWS))

    _same(subject, meter, "a preallocated state", {}, {"state": ready})
    tokens, targets = (subject.tokens(ROWS, LENGTH, "twin", name) for name in ("tokens", "targets"))
    model = subject.build(stir=0.1)
    want = run(model, tokens, targets)[0]
    with _small_likelihood_chunks():
        meter.close(run(model, tokens, targets)[0], want, "likelihood in chunks of five tokens")
    count = _declared_twins(subject, meter)
    meter.notes.append(f"{count} declared twins")
    return meter.summary()


def conditioning(spec: Spec) -> float:
    """How much the architecture amplifies rounding: float32 against float64 logits, in units of float32 rounding.

    max |logits32 - logits64| / (2^-24 max |logits64|) over a whole forward of the tiny configuration. A number, not
    a law: around 10 is a well-behaved network; above 1e3 the architecture is ill-conditioned, and float32
    comparisons between batch sizes or kernels say little about it.
    """
    subject = Subject(spec)
    tokens = subject.tokens(8, 64, "conditioning")
    with torch.no_grad():
        exact, coarse = (subject.build(dtype)(tokens).logits.double() for dtype in (torch.float64, torch.float32))
    return float((coarse - exact).abs().max() / (2.0**-24 * exact.abs().max()))
