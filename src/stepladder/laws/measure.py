"""What a call shows, and how two of them are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepladder.laws.law import Violation
from stepladder.models.base import State
from stepladder.models.lm import LanguageModel, ModelState

ROUNDING = 1e-10
"""How far two float64 computations of one function may differ, relative to max(1, largest value).

Sums of at most some thousand terms in another order differ by about 1e3 x 2^-53 = 1e-13; the rest is room for the
amplification of a few layers. An architecture that needs more is ill-conditioned: see ``conditioning``.
"""

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """All that one call shows: logits (B, T, V), nll and every named loss (B, T), and the state after it.

    taught: which of the losses are there only where targets are given.
    """

    named: dict[str, Tensor]
    state: ModelState
    taught: frozenset[str]

    def at(self, *index: Any) -> dict[str, Tensor]:
        """The results at an index of (batch, time)."""
        return {name: value[index] for name, value in self.named.items()}


def observe(model: LanguageModel, tokens_BT: Tensor, targets_BT: Tensor, **call: Any) -> Seen:
    """Run a chunk both ways, for logits and for the likelihood, without gradients."""
    with torch.no_grad():
        plain = model(tokens_BT, **call)
        scored = model(tokens_BT, targets=targets_BT, **call)
    named = {"logits": plain.logits, "nll": scored.nll_BT}
    for name, value in scored.losses.items():
        if value.shape != tokens_BT.shape:
            raise Violation(f"loss '{name}' has shape {tuple(value.shape)}, not one number a token")
        named[f"loss '{name}'"] = value
    return Seen(named, plain.state, frozenset(f"loss '{name}'" for name in scored.losses.keys() - plain.losses.keys()))


@dataclass
class Meter:
    """Compares results, remembers the largest difference, and stops at the first that is too large."""

    count: int = 0
    worst: float = 0.0
    notes: list[str] = field(default_factory=list)

    def equal(self, got: Named, want: Named, where: str) -> None:
        """Every bit must be equal."""
        self.close(got, want, where, bound=0.0)

    def close(self, got: Named, want: Named, where: str, bound: float = ROUNDING) -> None:
        """Equal up to ``bound`` relative to max(1, largest value)."""
        if got.keys() != want.keys():
            raise Violation(f"{where}: one side has {sorted(got)}, the other {sorted(want)}")
        for name, value in got.items():
            self._compare(name, value, want[name], where, bound)

    def states(
        self,
        got: State,
        want: State,
        where: str,
        bound: float = ROUNDING,
        strict: bool = False,
        but: Container[str] = (),
    ) -> None:
        """Leaves of one place and shape must agree; with ``strict`` all of them, except places named in ``but``."""
        a, b = dict(_named(got)), dict(_named(want))
        if strict and [(name, leaf.shape) for name, leaf in a.items()] != [(n, leaf.shape) for n, leaf in b.items()]:
            shapes = [", ".join(f"{n} {tuple(leaf.shape)}" for n, leaf in side.items()) for side in (a, b)]
            raise Violation(f"the states have different forms, {shapes[0]} and {shapes[1]} ({where})")
        for name, leaf in a.items():
            if name not in but and name in b and leaf.shape == b[name].shape:
                self._compare(f"state {name}", leaf, b[name], where, bound)

    def summary(self) -> str:
        """What was measured, for the finding."""
        return "; ".join([f"largest difference {self.worst:.1e} in {self.count} comparisons", *self.notes])

    def _compare(self, name: str, got: Tensor, want: Tensor, where: str, bound: float) -> None:
        if got.shape != want.shape:
            raise Violation(f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)} ({where})")
        self.count += 1
        if got.numel() == 0:
            return
        a, b = got.detach().double(), want.detach().double()
        if not (a.isfinite().all() and b.isfinite().all()):
            raise Violation(f"{name} is not finite ({where})")
        moved = float((a - b).abs().max()) / max(1.0, float(b.abs().max()))
        if moved > bound:
            allowed = "0 is allowed" if bound == 0 else f"rounding explains {bound:.0e}"
            raise Violation(f"{name} moved by {moved:.1e} where {allowed} ({where})")
        self.worst = max(self.worst, moved)


def _named(state: State, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state with their places in its tree."""
    if isinstance(state, Tensor):
        yield path.removeprefix("."), state
    elif isinstance(state, tuple | list):
        for place, part in enumerate(state):
            yield from _named(part, f"{path}.{place}")
    elif isinstance(state, dict):
        for name, part in state.items():
            yield from _named(part, f"{path}.{name}")
    elif state is not None:
        for each in dataclasses.fields(state):
            yield from _named(getattr(state, each.name), f"{path}.{each.name}")
