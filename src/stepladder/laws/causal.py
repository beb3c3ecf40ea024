"""Nothing sees the future: the exact form (perturb a token) and the statistical form (noise cannot be learned)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepladder.laws.law import VOCAB, Mode, Subject, Violation, law
from stepladder.laws.measure import Meter, observe
from stepladder.models.base import map_state
from stepladder.train.loss import objective

ROWS = 3


def _changed(values: Tensor, place: int, modulus: int = VOCAB) -> Tensor:
    """Every value from ``place`` on replaced by another one."""
    values = values.clone()
    shift = 1 + torch.arange(values.shape[1] - place) % (modulus - 1)
    values[:, place:] = (values[:, place:] + shift) % modulus
    return values


def _future_is_unseen(
    subject: Subject, mode: Mode, documents: Tensor | None, how: str, meter: Meter, ticks: int | None = None
) -> None:
    """All results before ``place`` must stay, bit for bit, when tokens, targets or documents from it on change.

    The bound is 0 with no allowance: both calls have equal shapes, hence the same order of summation, and a masked
    key has weight exp(-inf) = 0, which adds nothing.
    """
    length, keys = subject.length(), subject.keys(ROWS)
    tokens, targets = (subject.tokens(ROWS, length, "causal", name) for name in ("tokens", "targets"))
    call = {"documents": documents, "key": keys, "ticks": ticks}
    base = observe(mode.model, tokens, targets, **call)
    for place in subject.places():
        before = (slice(None), slice(place))
        other = observe(mode.model, _changed(tokens, place), targets, **call)
        where = f"position < {place} after changing tokens from {place} on, {mode.label}, {how}"
        meter.equal(other.at(*before), base.at(*before), where)
        if torch.equal(other.named["logits"][:, place], base.named["logits"][:, place]):
            raise Violation(f"changing token {place} did not move its own logits ({mode.label}): the law sees nothing")
        other = observe(mode.model, tokens, _changed(targets, place), **call)
        where = f"position < {place} after changing targets from {place} on, {mode.label}, {how}"
        meter.equal(other.at(*before), base.at(*before), where)
        if documents is not None:
            cut = torch.where(torch.arange(length) < place, documents, documents + 100)
            other = observe(mode.model, tokens, targets, **{**call, "documents": cut})
            where = f"position < {place} after a new document from {place} on, {mode.label}, {how}"
            meter.equal(other.at(*before), base.at(*before), where)


def _future_is_unseen_in_chunks(subject: Subject, mode: Mode, meter: Meter) -> None:
    """The same inside the second of two chunks, where a carried state takes other paths."""
    length, first = subject.length(), 5
    tokens, targets = (subject.tokens(ROWS, length, "causal", name) for name in ("tokens", "targets"))
    begun = observe(mode.model, tokens[:, :first], targets[:, :first], key=subject.keys(ROWS)).state
    tokens, targets = tokens[:, first:], targets[:, first:]

    def rest(tokens: Tensor) -> dict[str, Tensor]:
        return observe(mode.model, tokens, targets, state=map_state(torch.clone, begun)).named

    base = rest(tokens)
    for place in (place for place in subject.places() if place < length - first):
        other = rest(_changed(tokens, place))
        where = f"position < {place} of a second chunk after changing its tokens from {place} on, {mode.label}"
        for name, value in base.items():
            meter.equal({name: other[name][:, :place]}, {name: value[:, :place]}, where)


@law("causal", says="what comes at or after a token changes nothing before it, bit for bit, in any mode")
def causal(subject: Subject) -> str:
    """Logits, likelihood and losses, in eval and train mode, alone, left-padded, packed and in chunks."""
    meter, length = Meter(), subject.length()
    padded = (torch.arange(length) >= torch.tensor([0, 3, 11])[:, None]).long()
    layouts = [(None, "one document"), (padded, "left padding"), (subject.documents(ROWS, length), "packed documents")]
    for mode in subject.modes():
        for documents, how in layouts:
            _future_is_unseen(subject, mode, documents, how, meter)
        _future_is_unseen_in_chunks(subject, mode, meter)
        for ticks in subject.budgets()[1:]:
            _future_is_unseen(subject, mode, None, f"one document, ticks={ticks}", meter, ticks)
    return meter.summary()


STEPS, WINDOW, BATCH, LENGTH, SYMBOLS, DEVIATIONS = 120, 30, 32, 16, 8, 4.0


@law("noise", says="trained on independent uniform tokens, the loss on fresh ones never falls below ln V")
def noise(subject: Subject) -> str:
    """E[nll of a fresh token given its past] >= ln V for whatever distribution a causal model predicts (Gibbs).

    The tokens' nll, centred, are martingale differences, hence uncorrelated: the mean over the n tokens of a window
    of 30 fresh batches has standard error sd(nll) / sqrt(n), and falls below ln V by more than 4 of those once in
    30 000 windows. 1e-5 more is left for rounding in float32. The learning rate falls to 0, so that what training
    on noise costs an honest model, about 0.002 nats, hides no more than as small a leak.
    """
    model = subject.build(torch.float32, vocab=SYMBOLS, **subject.noisy).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    bound, seen, lowest = math.log(SYMBOLS), [], math.inf
    for step in range(1, STEPS + 1):
        stream = subject.tokens(BATCH, LENGTH + 1, "noise", step, vocab=SYMBOLS)
        out = model(stream[:, :-1], targets=stream[:, 1:], key=step)
        total, _ = objective(out, stream[:, 1:], {})
        optimizer.zero_grad()
        (total / stream[:, 1:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen.append(out.nll_BT.detach().double())
        if step % WINDOW == 0:
            window = torch.stack(seen[-WINDOW:])
            gain, error = bound - float(window.mean()), float(window.std()) / math.sqrt(window.numel())
            lowest = min(lowest, -gain)
            if not gain <= DEVIATIONS * error + 1e-5:
                raise Violation(
                    f"the loss on random tokens is {gain:.4f} nats below ln {SYMBOLS} after {step} steps "
                    f"({gain / max(error, 1e-9):.0f} standard errors): the future is seen, or the likelihood is wrong"
                )
    return f"lowest mean over {WINDOW} fresh batches: ln {SYMBOLS} {lowest:+.4f} nats in {STEPS} steps"
