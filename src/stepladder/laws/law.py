"""What a law is, and what it is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepladder.core.errors import UserError
from stepladder.core.keys import below, key
from stepladder.models.lm import LanguageModel
from stepladder.models.spec import Spec

VOCAB = 23
"""Token ids of the models that laws build: small, odd, and no power of two."""


class Violation(Exception):
    """A law is broken. The message is the finding: one sentence with the number that was measured."""


@dataclass(frozen=True)
class Law:
    """A property that every architecture must have. ``run`` returns what it measured, or raises Violation."""

    name: str
    says: str
    run: Callable[[Subject], str]


def law(name: str, says: str) -> Callable[[Callable[[Subject], str]], Law]:
    """Make a function that measures a Subject into a Law; ``says`` is the law in one sentence."""
    return lambda run: Law(name, says, run)


class Subject:
    """An architecture in the configuration that the laws are held against, and the input they give it."""

    vocab = VOCAB

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.name = spec.kind or type(spec).__name__

    def build(
        self,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        *,
        vocab: int = VOCAB,
        stir: float = 0.0,
        **fields: Any,
    ) -> LanguageModel:
        """A model in eval mode; the same arguments give the same weights. ``fields`` replace fields of the spec.

        stir: standard deviation of noise added to every parameter. Parts that start switched off (gates and
        output maps at zero) hide what they do; a law about what a model *computes* stirs it first.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.with_fields(**fields).build(vocab).to(dtype)
            with torch.no_grad():
                for parameter in model.parameters():
                    if stir:
                        parameter.add_(torch.randn(parameter.shape), alpha=stir)
        return model.eval()

    def with_fields(self, **fields: Any) -> Spec:
        """The spec with some fields replaced, validated."""
        if not fields:
            return self.spec
        return type(self.spec).model_validate({**self.spec.model_dump(mode="json"), **fields})

    def modes(self, stir: float | None = None, seed: int = 0) -> Iterator[Mode]:
        """The model in eval mode, and in train mode with its stochastic parts on.

        Loops are stirred more by default, so that rules of halting tell tokens apart.
        """
        if stir is None:
            stir = 0.1 if self.ticks is None else 0.3
        yield Mode("eval mode", self.build(seed=seed, stir=stir))
        yield Mode("train mode", self.build(seed=seed, stir=stir, **self.noisy).train())

    @property
    def noisy(self) -> dict[str, Any]:
        """Fields that switch stochastic parts on; none if the architecture has no dropout."""
        return {"dropout": 0.3} if "dropout" in type(self.spec).model_fields else {}

    def tokens(self, batch: int, length: int, *path: str | int, vocab: int = VOCAB) -> Tensor:
        """Uniform tokens (B, T), a pure function of the path."""
        words = key(0, "laws", *path).words(np.arange(batch), length)
        return torch.from_numpy(below(words, vocab))

    def keys(self, batch: int) -> Tensor:
        """One random key a row (B,), so that a row keeps its noise when it is moved."""
        return torch.from_numpy(key(0, "laws", "keys").words(np.arange(batch), 1)[:, 0] >> np.uint64(2)).to(torch.int64)

    def documents(self, batch: int, length: int) -> Tensor:
        """Document ids (B, T) for packed rows: documents of different lengths in every row, ids not from 0."""
        place = torch.arange(length)
        sizes = 3 + (torch.arange(batch) * 4) % 9
        return 5 + place[None, :] // sizes[:, None]

    @cached_property
    def ticks(self) -> int | None:
        """The architecture's own tick budget if it has a loop, else None: its field ``ticks``, or what it reports."""
        model, tokens = self.build(), self.tokens(1, 8, "ticks")
        with torch.no_grad():
            try:
                model(tokens, ticks=2)
            except UserError:
                return None
            reported = model(tokens, trace=True).trace.get("ticks")
        own = getattr(self.spec, "ticks", None)
        if isinstance(own, int):
            return own
        return 2 if reported is None else int(reported.max())

    def budgets(self) -> tuple[int | None, ...]:
        """Tick budgets worth trying: the architecture's own, and one more if it has a loop."""
        own = self.ticks
        return (None,) if own is None else (None, own + 1)

    def places(self) -> list[int]:
        """Positions around which implementations change course: the start, powers of two, chunk borders."""
        borders = {16, 32} | {
            size * times
            for name in type(self.spec).model_fields
            if "chunk" in name and isinstance(size := getattr(self.spec, name), int) and 2 < size <= 64
            for times in (1, 2)
        }
        return sorted({1, 2, *(border + shift for border in borders for shift in (-1, 0, 1))})

    def length(self) -> int:
        """A sequence length that reaches past all ``places``."""
        return self.places()[-1] + 4


@dataclass(frozen=True)
class Mode:
    """A model and the words for the mode it is in."""

    label: str
    model: LanguageModel
