"""A row is alone: batch-mates, padding and packed neighbours do not matter."""

from __future__ import annotations

import torch

from stepladder.laws.law import Mode, Subject, Violation, law
from stepladder.laws.measure import Meter, observe
from stepladder.models.base import IGNORE, leaves, take_rows

ROWS, LENGTH, PAD = 5, 21, 7


def _mates_do_not_matter(subject: Subject, mode: Mode, ticks: int | None, meter: Meter) -> None:
    """Other rows' content (bit for bit: equal shapes); their order and number (rounding: other shapes)."""
    tokens, targets = (subject.tokens(ROWS, LENGTH, "rows", name) for name in ("tokens", "targets"))
    keys, rest = subject.keys(ROWS), subject.tokens(ROWS, 6, "rows", "rest")
    base = observe(mode.model, tokens, targets, key=keys, ticks=ticks)
    further = observe(mode.model, rest, rest, state=base.state, ticks=ticks)
    for leaf in leaves(base.state):
        if leaf.dim() == 0 or leaf.shape[0] != ROWS:
            raise Violation(f"a state leaf of shape {tuple(leaf.shape)} has no batch of {ROWS}: rows share it")
    how = f"{mode.label}, ticks={ticks}"
    for row in range(ROWS):
        others = torch.arange(ROWS) != row
        changed = torch.where(others[:, None], (tokens + 1 + torch.arange(LENGTH)) % subject.vocab, tokens)
        masked = torch.where(others[:, None], (targets + 1) % subject.vocab, targets)
        seen = observe(mode.model, changed, masked, key=torch.where(others, keys + 1, keys), ticks=ticks)
        meter.equal(seen.at(row), base.at(row), f"row {row} after changing all other rows, {how}")
        alone = observe(mode.model, tokens[[row]], targets[[row]], key=keys[[row]], ticks=ticks)
        meter.close(alone.at(0), base.at(row), f"row {row} alone instead of in a batch of {ROWS}, {how}")
    for order in ([3, 0, 4, 1, 2], [4, 2], [1, 1, 0]):
        index = torch.tensor(order)
        seen = observe(mode.model, tokens[index], targets[index], key=keys[index], ticks=ticks)
        meter.close(seen.named, base.at(index), f"rows {order} instead of all, {how}")
        meter.states(seen.state, take_rows(base.state, index), f"state of rows {order}, {how}", strict=True)
        regrouped = take_rows(base.state, index)
        seen = observe(mode.model, rest[index], rest[index], state=regrouped, ticks=ticks)
        meter.close(seen.named, further.at(index), f"rows {order} taken from a state and continued, {how}")


def _padding_does_not_matter(subject: Subject, mode: Mode, meter: Meter) -> None:
    """Padding on the right, targets that are not scored, and padding on the left as a document of its own."""
    tokens, targets = (subject.tokens(ROWS, LENGTH, "rows", name) for name in ("tokens", "targets"))
    keys, noise = subject.keys(ROWS), subject.tokens(ROWS, PAD, "rows", "pad")
    base = observe(mode.model, tokens, targets, key=keys)
    seen = observe(mode.model, torch.cat((tokens, noise), 1), torch.cat((targets, noise), 1), key=keys)
    meter.close(seen.at(slice(None), slice(LENGTH)), base.named, f"{PAD} tokens of padding on the right, {mode.label}")
    unscored = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    unscored[0] = True  # a row that is nothing but padding scores 0, not NaN
    seen = observe(mode.model, tokens, targets.masked_fill(unscored, IGNORE), key=keys)
    want = {**base.named, "nll": base.named["nll"].masked_fill(unscored, 0.0)}
    # A named loss is as it was. Only one that a call without targets does not have may be 0 where there is no target.
    for name in base.taught:
        want[name] = want[name].masked_fill(unscored & (seen.named[name] == 0), 0.0)
    meter.close(seen.named, want, f"half of the targets not scored, {mode.label}")
    rest = subject.tokens(ROWS, 4, "rows", "rest")
    further = observe(mode.model, rest, rest, state=base.state)
    for row in range(ROWS):
        pad = 1 + (row * 3) % PAD
        left = torch.cat((noise[:, :pad], tokens), 1), torch.cat((noise[:, :pad], targets), 1)
        documents = torch.cat((torch.zeros(ROWS, pad), torch.ones(ROWS, LENGTH)), 1).long()
        seen = observe(mode.model, *left, documents=documents, key=keys)
        where = f"{pad} tokens of left padding as their own document, {mode.label}"
        meter.close(seen.at(slice(None), slice(pad, None)), base.named, where)
        seen = observe(mode.model, rest, rest, state=seen.state)
        meter.close(seen.named, further.named, f"{where}, and then continued")


def _ragged_padding_does_not_matter(subject: Subject, mode: Mode, meter: Meter) -> None:
    """Rows of different length in one batch, padded on the left, and decoded on: each as if it were alone."""
    pads = (torch.arange(ROWS) * 3) % PAD
    tokens, targets = (subject.tokens(ROWS, LENGTH, "rows", "ragged", name) for name in ("tokens", "targets"))
    rest, keys = subject.tokens(ROWS, 3, "rows", "rest"), subject.keys(ROWS)
    documents = (torch.arange(LENGTH) >= pads[:, None]).long()
    for preallocated in (False, True):
        start = {"state": mode.model.init_state(ROWS, LENGTH + 3, key=keys)} if preallocated else {"key": keys}
        seen = observe(mode.model, tokens, targets, documents=documents, **start)
        further = observe(mode.model, rest, rest, state=seen.state)
        for row, pad in enumerate(pads.tolist()):
            alone = observe(mode.model, tokens[[row], pad:], targets[[row], pad:], key=keys[[row]])
            where = f"row with {pad} of {LENGTH} tokens of left padding in a ragged batch, {mode.label}"
            meter.close(seen.at(row, slice(pad, None)), alone.at(0), where)
            alone = observe(mode.model, rest[[row]], rest[[row]], state=alone.state)
            meter.close(further.at(row), alone.at(0), f"{where}, continued")


def _packed_neighbours_do_not_matter(subject: Subject, mode: Mode, ticks: int | None, meter: Meter) -> None:
    """D9: what document A says changes nothing in B behind it, and B packed is B alone."""
    tokens, targets = (subject.tokens(ROWS, LENGTH, "rows", "packed", name) for name in ("tokens", "targets"))
    keys = subject.keys(ROWS)
    for cut in (1, 2, 8, LENGTH - 1):
        documents = (torch.arange(LENGTH) >= cut).long().expand(ROWS, -1)
        call = {"documents": documents, "key": keys, "ticks": ticks}
        base, behind = observe(mode.model, tokens, targets, **call), (slice(None), slice(cut, None))
        changed = torch.cat(((tokens[:, :cut] + 5) % subject.vocab, tokens[:, cut:]), 1)
        masked = torch.cat(((targets[:, :cut] + 5) % subject.vocab, targets[:, cut:]), 1)
        seen = observe(mode.model, changed, masked, **call)
        where = f"document B after changing the {cut} tokens of A before it, {mode.label}, ticks={ticks}"
        meter.equal(seen.at(*behind), base.at(*behind), where)
        alone = observe(mode.model, tokens[:, cut:], targets[:, cut:], key=keys, ticks=ticks)
        where = f"document B alone instead of behind {cut} tokens of A, {mode.label}, ticks={ticks}"
        meter.close(alone.named, base.at(*behind), where)


@law("rows", says="batch-mates, padding and packed neighbours change nothing: a batch of one is a row of a batch")
def rows(subject: Subject) -> str:
    """Each check with the weights as built and with strongly stirred ones, so that halting rules part the rows."""
    meter, budgets = Meter(), subject.budgets()
    for seed, stir in enumerate((0.1, 0.3, 1.0) if subject.ticks else (0.1, 0.3)):
        for mode in subject.modes(stir=stir, seed=seed):
            for ticks in budgets if mode.label == "eval mode" else budgets[:1]:
                _mates_do_not_matter(subject, mode, ticks, meter)
                _packed_neighbours_do_not_matter(subject, mode, ticks, meter)
            _padding_does_not_matter(subject, mode, meter)
            _ragged_padding_does_not_matter(subject, mode, meter)
    return meter.summary()
