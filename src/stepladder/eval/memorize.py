"""Memorisation at test time: a text is read, and where that left the model's memories the next text begins.

A memory of a document starts at learned weights. To memorise a text is to read it as one document and to put the
weights that are in force behind it in the place of those at the start; everything else that reading leaves behind (keys
and values, convolutions, positions) is dropped, so that nothing but a memory can carry anything over. ``steps`` times
reading is ``steps`` times doing so. A model without such memories memorises nothing: its two scores are the same.

The rules that all suites keep: what is scored is never what was just memorised, and the plain score stands beside the
adapted one. An item's right answer is fed, if at all, after the item was scored, so that it can help others alone; such
a run is marked as not comparable.

Memories, as ``eval.memorize.paths`` calls them: ``memory`` (Titans), ``selfmod`` (self-modifying memories), ``cms`` (a
continuum memory), ``cms.0`` (its fastest level), ``cms.1``, ...
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepladder.core.config import canonical
from stepladder.models.base import State
from stepladder.models.channels.cms import Levels
from stepladder.models.fast.fast_weights import Memory
from stepladder.models.fast.walk import Walker
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.neural_memory import FastMemory
from stepladder.run import Memorize

PIECE = 1024
"""Tokens of a call."""


def switches(on: bool, fields: Mapping[str, Any]) -> list[str]:
    """Flags of the command line as overrides of ``eval``: none if nothing is memorised; any field given says it is."""
    given = {name: value for name, value in fields.items() if value is not None}
    return [f"memorize={canonical(given)}"] if on or given else []


class Memorizer:
    """The memories of one model, and what they have learned since they were last ``reset``. Under ``evaluating``."""

    def __init__(self, model: LanguageModel, config: Memorize) -> None:
        self.model, self.config = model, config
        self.walkers = [part for part in model.modules() if isinstance(part, Walker)]
        self.count: Counter[str] = Counter(read=0, below_threshold=0)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._learned: list[tuple[nn.Parameter, Tensor]] = []

    def read(self, ids: np.ndarray) -> None:
        """Memorise a text, int64 ids [T]; at once only if its mean loss reaches the threshold, where there is one."""
        if not self.walkers or len(ids) < 2:
            return
        device = self.walkers[0].first[0].device
        tokens = torch.from_numpy(ids.astype(np.int64)).to(device)[None]
        for _ in range(self.config.steps):
            with self.applied():
                state, nats = self._pass(tokens)
            if self.config.surprise is not None and not nats >= self.config.surprise:
                self.count["below_threshold"] += 1
                return
            self.count["read"] += 1
            found = list(memories(state))
            if len(found) != len(self.walkers):
                raise RuntimeError(f"the state holds {len(found)} memories, the model has {len(self.walkers)}")
            self._learned = [
                each
                for walker, memory in zip(self.walkers, found, strict=True)
                for each in learned(walker, memory, self.config.paths)
            ]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model begins every document with what was memorised; on leaving, its weights are as before."""
        before = [(weight, weight.data) for weight, _ in self._learned]
        try:
            for weight, value in self._learned:
                weight.data = value.to(weight.dtype)
            yield
        finally:
            for weight, value in before:
                weight.data = value

    def _pass(self, tokens: Tensor) -> tuple[State, float]:
        state, total = None, 0.0
        for first in range(0, tokens.shape[1] - 1, PIECE):
            place = slice(first, min(first + PIECE, tokens.shape[1] - 1))
            out = self.model(tokens[:, place], state, targets=tokens[:, place.start + 1 : place.stop + 1])
            assert out.nll_BT is not None
            state, total = out.state, total + float(out.nll_BT.sum())
        return self.model(tokens[:, -1:], state).state, total / (tokens.shape[1] - 1)

    def about(self) -> dict[str, Any]:
        """What stands in the results of a suite."""
        return {
            **self.config.model_dump(mode="json"),
            "applied": True,
            "memories": len(self.walkers),
            "comparable": not self.config.use_correct_answer,
            **self.count,
        }


def memories(state: State) -> Iterator[Memory]:
    """The memories in a state, in the order of its tree, which is that of the model's parts."""
    if isinstance(state, Memory):
        yield state
    elif isinstance(state, tuple | list):
        for part in state:
            yield from memories(part)
    elif isinstance(state, dict):
        for part in state.values():
            yield from memories(part)
    elif is_dataclass(state):
        for field in fields(state):
            yield from memories(getattr(state, field.name))


def learned(walker: Walker, memory: Memory, paths: Sequence[str]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The start weights of a learner that ``paths`` name, with the weights (H, O, I) that its next token would meet."""
    wanted = set(paths)
    kind = "cms" if isinstance(walker, Levels) else "memory" if isinstance(walker, FastMemory) else "selfmod"
    weights = memory.now if isinstance(walker, FastMemory) else memory.base
    for place, (first, now) in enumerate(zip(walker.first, weights, strict=True)):
        level = f"cms.{place // 2}" if kind == "cms" else kind
        if wanted & {"all", kind, level}:
            yield first, now[0].detach().clone()
