"""Equal cost: solve a rung's free fields until its parameters equal the control's, and say what is left over."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import Any

import torch

from stepladder.core.errors import UserError
from stepladder.models.base import Cost
from stepladder.models.zoo import Spec, spec

TOLERANCE = 0.01
"""Largest relative residual at which two rungs count as matched."""


@dataclass(frozen=True)
class Match:
    """A solved specification, its parameters and the relative residual: (own - target) / target."""

    spec: Spec
    params: int
    residual: float


def cost(of: Spec, vocab: int, context: int, ticks: int | None = None) -> Cost:
    """Cost of an architecture without allocating it: the model is built on the meta device."""
    with torch.device("meta"):
        return of.build(vocab).cost(context, ticks)


def count(of: Spec, vocab: int) -> int:
    """Parameters of an architecture, each counted once, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in of.build(vocab).parameters())


def sized(name: str, size: str | None, vocab: int, **fields: Any) -> Spec:
    """Architecture ``name`` at a named size for ``vocab`` token ids, with ``fields`` on top.

    Where the size is a number of parameters ("125M", "1B-16k"), the solver meets it within 5 %, or refuses.
    """
    chosen = spec(name, size, **fields)
    number = re.match(r"(\d+)([MB])(-|$)", size or "")
    if number is None:
        return chosen
    target = int(number[1]) * {"M": 10**6, "B": 10**9}[number[2]]
    found = match_params(chosen, target, vocab)
    if abs(found.residual) > 0.05:
        raise UserError(
            f"{name} at {size} with a vocabulary of {vocab} has {found.params:,} parameters at best; "
            "give another size, a smaller vocabulary or tied=true"
        )
    return found.spec


def match_params(start: Spec, target: int, vocab: int, fixed: tuple[str, ...] = ()) -> Match:
    """Turn the spec's knobs, bar ``fixed`` ones, until it has ``target`` parameters, changing as little as possible.

    The finest knob is turned first (parameters grow with it, so the nearest count can be found). Only if that
    leaves more than the tolerance are coarser knobs turned, the finest again at each of their values. Where the
    finest is fixed, the coarser ones take the value that comes nearest.
    """
    knobs = [name for name in type(start).knobs if name in type(start).model_fields]
    best = _residual(start, target, vocab)
    if not knobs or abs(best.residual) <= 0.001:
        return best
    if knobs[0] in fixed:
        for knob in (name for name in knobs if name not in fixed):
            if abs(best.residual) > TOLERANCE:
                best = min([best, *_scan(start, knob, target, vocab)], key=lambda m: abs(m.residual))
        return best
    knobs = [name for name in knobs if name not in fixed]
    best = min(best, _nearest(start, knobs[0], target, vocab), key=lambda m: abs(m.residual))
    for knob in knobs[1:]:
        for value in _nearby(getattr(start, knob)):
            if abs(best.residual) <= TOLERANCE:
                return best
            candidate = _with(start, {knob: value, knobs[0]: None})
            if candidate is not None:
                best = min(best, _nearest(candidate, knobs[0], target, vocab), key=lambda m: abs(m.residual))
    return best


def _nearby(value: int) -> list[int]:
    """Values from a quarter to four times ``value``, nearest first."""
    return sorted(range(max(1, value // 4), 4 * value + 1), key=lambda v: abs(v - value))


def _with(start: Spec, fields: dict[str, Any]) -> Spec | None:
    """The spec with other fields, or None where they do not go together."""
    try:
        return type(start).model_validate({**start.model_dump(), **fields})
    except ValueError:
        return None


def _residual(start: Spec, target: int, vocab: int) -> Match:
    params = count(start, vocab)
    return Match(start, params, (params - target) / target)


def _scan(start: Spec, knob: str, target: int, vocab: int) -> list[Match]:
    """A match for every value of a knob, nearest to its own first, at which a model can be built."""
    tried = (_at(start, knob, value, target, vocab) for value in _nearby(getattr(start, knob)))
    return [match for match in tried if match is not None]


def _nearest(start: Spec, knob: str, target: int, vocab: int) -> Match:
    """The value of a knob at which the count comes nearest to the target.

    Parameters grow linearly with most knobs, so two builds tell where to look, and two more tell whether the target
    lies between neighbours; bisection takes some thirty, which is seconds for deep models.
    """
    first, second = (_at(start, knob, value, target, vocab) for value in (1, 2))
    if first is not None and first.params >= target:
        return first
    if first is not None and second is not None and first.params < second.params:
        below = 1 + (target - first.params) // (second.params - first.params)
        low, high = (_at(start, knob, value, target, vocab) for value in (below, below + 1))
        if low is not None and high is not None and low.params <= target <= high.params:
            return min(low, high, key=lambda m: abs(m.residual))
    return _bisect(start, knob, target, vocab)


def _at(start: Spec, knob: str, value: int, target: int, vocab: int) -> Match | None:
    """The match at a value of a knob, or None where no model can be built."""
    candidate = _with(start, {knob: value})
    if candidate is not None:
        with contextlib.suppress(UserError):  # the fields may be legal one by one, but not together
            return _residual(candidate, target, vocab)
    return None


def _bisect(start: Spec, knob: str, target: int, vocab: int) -> Match:
    low, high = 1, 2 * target
    best: Match | None = None
    while low <= high:
        middle = (low + high) // 2
        found = _at(start, knob, middle, target, vocab)
        if found is None:
            break
        if best is None or abs(found.residual) < abs(best.residual):
            best = found
        if found.params == target:
            break
        low, high = (middle + 1, high) if found.params < target else (low, middle - 1)
    return best or Match(start, 0, float("inf"))
