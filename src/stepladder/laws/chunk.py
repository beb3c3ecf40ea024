"""A sequence may be cut anywhere: whole = any split into chunks with carried state."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stepladder.core.errors import UserError
from stepladder.laws.law import Mode, Subject, Violation, law
from stepladder.laws.measure import Meter, Seen, observe
from stepladder.models.base import leaves, map_state
from stepladder.models.lm import LanguageModel, ModelState

ROWS, GREEDY = 3, 12


def _splits(subject: Subject) -> dict[str, list[int]]:
    """Chunk borders by name: ones, uneven, and one cut around every place."""
    length = subject.length()
    uneven = [0, 3, 4, 11, 11 + length // 3, length]
    cuts = {f"cut at {place}": [0, place, length] for place in subject.places()}
    return {"chunks of one token": list(range(length + 1)), "uneven chunks": uneven, **cuts}


def _in_chunks(
    model: LanguageModel, tokens: Tensor, targets: Tensor, borders: list[int], state: ModelState | None, **call: Any
) -> Seen:
    """Observe chunk after chunk and join the results along time."""
    documents, keys = call.pop("documents", None), call.pop("key")
    parts: list[Seen] = []
    for first, last in pairwise(borders):
        chunk = slice(first, last)
        start = {"key": keys} if state is None else {}
        inside = None if documents is None else documents[:, chunk]
        seen = observe(model, tokens[:, chunk], targets[:, chunk], state=state, documents=inside, **start, **call)
        state = seen.state
        parts.append(seen)
    joined = {name: torch.cat([part.named[name] for part in parts], dim=1) for name in parts[0].named}
    return Seen(joined, parts[-1].state, parts[0].taught)


def _whole_is_chunks(subject: Subject, mode: Mode, ticks: int | None, packed: bool, meter: Meter) -> None:
    length, keys = subject.length(), subject.keys(ROWS)
    tokens, targets = (subject.tokens(ROWS, length, "chunk", name) for name in ("tokens", "targets"))
    documents = subject.documents(ROWS, length) if packed else None
    call = {"documents": documents, "ticks": ticks, "key": keys}
    whole = observe(mode.model, tokens, targets, **call)
    how = f"{mode.label}, {'packed documents' if packed else 'one document'}, ticks={ticks}"
    splits = _splits(subject)
    tried = list(splits) if ticks is None else list(splits)[:2]  # other budgets take no other path at a border
    for split in tried:
        seen = _in_chunks(mode.model, tokens, targets, splits[split], None, **call)
        meter.close(seen.named, whole.named, f"{split}, {how}")
        meter.states(seen.state, whole.state, f"{split}, {how}", strict=True)
    for split, capacity in (("chunks of one token", length), ("uneven chunks", length + 5)):
        ready = mode.model.init_state(ROWS, capacity, ticks=ticks, key=keys)
        seen = _in_chunks(mode.model, tokens, targets, splits[split], ready, **call)
        where = f"{split}, preallocated for {capacity} of {length} tokens, {how}"
        meter.close(seen.named, whole.named, where)
        meter.states(seen.state, whole.state, where)


def _gradients_cross_chunks(subject: Subject, mode: Mode, meter: Meter) -> None:
    """A state that is not detached carries gradients: cutting changes no derivative."""
    length, keys = subject.length(), subject.keys(ROWS)
    tokens, targets = (subject.tokens(ROWS, length, "chunk", name) for name in ("tokens", "targets"))

    def gradients(borders: list[int]) -> dict[str, Tensor]:
        mode.model.zero_grad(set_to_none=True)
        state, total = None, torch.zeros((), dtype=torch.float64)
        for first, last in pairwise(borders):
            start = {"key": keys} if state is None else {}
            out = mode.model(tokens[:, first:last], state, targets=targets[:, first:last], **start)
            state = out.state
            total = total + out.nll_BT.sum() + sum(value.sum() for value in out.losses.values())
        total.backward()
        named = mode.model.named_parameters()
        return {f"gradient of {name}": p.grad.clone() for name, p in named if p.grad is not None}

    whole = gradients([0, length])
    meter.close(gradients(_splits(subject)["uneven chunks"]), whole, f"uneven chunks, {mode.label}")


def _greedy_is_recomputation(subject: Subject, model: LanguageModel, ticks: int | None) -> None:
    """Decoding token by token picks what recomputing the whole prefix picks."""
    prompt = subject.tokens(ROWS, 5, "chunk", "prompt")
    with torch.no_grad():
        recomputed = prompt
        for _ in range(GREEDY):
            best = model(recomputed, ticks=ticks).logits[:, -1].argmax(-1)
            recomputed = torch.cat((recomputed, best[:, None]), 1)
        for state in (None, model.init_state(ROWS, 5 + GREEDY, ticks=ticks)):
            decoded, new = prompt, prompt
            for _ in range(GREEDY):
                out = model(new, state, ticks=ticks, logits_at="last")
                state, new = out.state, out.logits[:, -1].argmax(-1)[:, None]
                decoded = torch.cat((decoded, new), 1)
            if not torch.equal(decoded, recomputed):
                place = int((decoded != recomputed).any(0).nonzero()[0]) - 5
                raise Violation(f"greedy decoding differs from recomputing the prefix at new token {place}")


def _state_can_be_used_twice(subject: Subject, model: LanguageModel, preallocated: bool) -> None:
    """Two continuations of one state do not meet: a state that was passed in is never written to (G7)."""
    prompt, left, right = (subject.tokens(ROWS, n, "chunk", "reuse", n) for n in (6, 4, 3))
    how = "preallocated" if preallocated else "growing"
    with torch.no_grad():
        begun = model(prompt, model.init_state(ROWS, 16) if preallocated else None).state
        kept = map_state(torch.clone, begun)
        first = model(left, begun).logits
        model(right, begun)
        again = model(left, begun).logits
    if not torch.equal(first, again):
        raise Violation(f"a {how} state gives another result when it is continued a second time")
    if not all(torch.equal(a, b) for a, b in zip(leaves(begun), leaves(kept), strict=True)):
        raise Violation(f"a call wrote into the {how} state that was passed to it")


def _overflow_is_refused(subject: Subject, model: LanguageModel, meter: Meter) -> None:
    """More tokens than a preallocated state holds: refused, or right anyway, but never wrapped (G3)."""
    tokens = subject.tokens(ROWS, 9, "chunk", "overflow")
    with torch.no_grad():
        want = model(tokens).logits
        state: ModelState | None = model.init_state(ROWS, 8)
        parts = []
        try:
            for place in range(9):
                out = model(tokens[:, place : place + 1], state)
                state = out.state
                parts.append(out.logits)
        except UserError:
            if len(parts) < 8:
                raise Violation(f"a state preallocated for 8 tokens was full after {len(parts)}") from None
            return
    meter.close({"logits": torch.cat(parts, 1)}, {"logits": want}, "9 tokens into a state for 8")


@law("chunk", says="any split into chunks with carried state gives the whole; chunks of one token are decoding")
def chunk(subject: Subject) -> str:
    """Growing and preallocated states, packed and not, stochastic parts on and off, other tick budgets."""
    meter = Meter()
    budgets = subject.budgets()
    for mode in subject.modes():
        for ticks in budgets if mode.label == "eval mode" else budgets[:1]:
            for packed in (False, True):
                _whole_is_chunks(subject, mode, ticks, packed, meter)
        _gradients_cross_chunks(subject, mode, meter)
    model = subject.build(stir=0.1)
    for ticks in budgets:
        _greedy_is_recomputation(subject, model, ticks)
    for preallocated in (False, True):
        _state_can_be_used_twice(subject, model, preallocated)
    _overflow_is_refused(subject, model, meter)
    return meter.summary()
