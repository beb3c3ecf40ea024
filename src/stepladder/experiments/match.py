"""Equal cost: solve a rung's free fields until its parameters equal the control's, and say what is left over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stepladder.core.errors import UserError
from stepladder.models.base import Cost
from stepladder.models.zoo import Spec

TOLERANCE = 0.01
"""Largest relative residual at which two rungs count as matched."""


@dataclass(frozen=True)
class Match:
    """A solved specification, its parameters and the relative residual: (own - target) / target."""

    spec: Spec
    params: int
    residual: float


def cost(spec: Spec, vocab: int, context: int, ticks: int | None = None) -> Cost:
    """Cost of an architecture without allocating it: the model is built on the meta device."""
    with torch.device("meta"):
        return spec.build(vocab).cost(context, ticks)


def count(spec: Spec, vocab: int) -> int:
    """Parameters of an architecture, each counted once, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in spec.build(vocab).parameters())


def match_params(spec: Spec, target: int, vocab: int) -> Match:
    """Turn the spec's knobs until it has ``target`` parameters, changing as little as possible.

    The finest knob is turned first (parameters grow with it, so bisection finds the nearest count). Only if that
    leaves more than the tolerance are coarser knobs turned, the finest again at each of their values.
    """
    knobs = [name for name in type(spec).knobs if name in type(spec).model_fields]
    best = _residual(spec, target, vocab)
    if not knobs or abs(best.residual) <= 0.001:
        return best
    best = min(best, _bisect(spec, knobs[0], target, vocab), key=lambda m: abs(m.residual))
    for knob in knobs[1:]:
        for value in _nearby(getattr(spec, knob)):
            if abs(best.residual) <= TOLERANCE:
                return best
            candidate = _with(spec, {knob: value, knobs[0]: None})
            if candidate is not None:
                best = min(best, _bisect(candidate, knobs[0], target, vocab), key=lambda m: abs(m.residual))
    return best


def _nearby(value: int) -> list[int]:
    """Values from a quarter to four times ``value``, nearest first."""
    return sorted(range(max(1, value // 4), 4 * value + 1), key=lambda v: abs(v - value))


def _with(spec: Spec, fields: dict[str, Any]) -> Spec | None:
    """The spec with other fields, or None where they do not go together."""
    try:
        return type(spec).model_validate({**spec.model_dump(), **fields})
    except ValueError:
        return None


def _residual(spec: Spec, target: int, vocab: int) -> Match:
    params = count(spec, vocab)
    return Match(spec, params, (params - target) / target)


def _bisect(spec: Spec, knob: str, target: int, vocab: int) -> Match:
    low, high = 1, 2 * target
    best: Match | None = None
    while low <= high:
        middle = (low + high) // 2
        candidate = _with(spec, {knob: middle})
        if candidate is None:
            break
        try:
            found = _residual(candidate, target, vocab)
        except UserError:  # the fields are legal one by one but no model can be built from them together
            break
        if best is None or abs(found.residual) < abs(best.residual):
            best = found
        if found.params == target:
            break
        low, high = (middle + 1, high) if found.params < target else (low, middle - 1)
    return best or Match(spec, 0, float("inf"))
