"""The memory that training and decoding take, measured on the very calls that take it, without allocating it.

The library's own training step and forward run on fake tensors (torch's FakeTensorMode): these have a shape, a type
and a storage of so many bytes, but no numbers. A dispatch mode sees every storage come and go, so logits, gradients
and temporaries count while they exist. Kernels are those of a CPU, whose attention is fused as on a GPU; what a kernel
allocates inside is not seen, nor is the process itself (Python, torch).

Fake tensors cannot answer a question about their numbers. Every target counts as scored, every condition as true (so a
loop that may end early takes all its ticks), and every number as 0.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepladder.core.errors import UserError
from stepladder.data.stream import Batch
from stepladder.models.base import leaves
from stepladder.models.lm import LanguageModel
from stepladder.models.zoo import Spec
from stepladder.run import TrainConfig
from stepladder.train.optim import adamw
from stepladder.train.step import gradient_step


@dataclass(frozen=True)
class Training:
    """Bytes of one update. saved: storages held for the backward pass, parameters left out.

    peak: the most that exists at a time: weights, gradients, AdamW's moments, ``saved``, logits, temporaries.
    """

    saved: int
    peak: int


@dataclass(frozen=True)
class Decoding:
    """Bytes of decoding. state: what a token leaves to the next, of all sequences.

    peak: the most that exists at a time, weights included, while a prompt is read and one token after it.
    """

    state: int
    peak: int


def training(of: Spec, vocab: int, batch: int, context: int, train: TrainConfig, ticks: int | None = None) -> Training:
    """What an update on ``batch`` rows of ``context`` tokens takes, with the moments there from the update before.

    Of ``train``, precision, micro and recompute matter; ``compile`` is left out. ticks: None = the model's own. A
    UserError if the model refuses the context or the ticks, or if its shapes depend on the numbers it computes.
    """
    nothing = np.zeros((batch, context), np.int64)
    with _fake(of, vocab, context, ticks) as (model, live):
        optimizer = adamw(model, train)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        live.peak = live.now
        own = frozenset(map(_place, model.parameters()))
        with saved_tensors_hooks(lambda tensor: live.keep(tensor, own), _same):
            gradient_step(
                model, optimizer, Batch(nothing, nothing, nothing, nothing[:, 0]), train, lr=train.lr, noise=0
            )
        return Training(live.saved, live.peak)


def decoding(of: Spec, vocab: int, batch: int, context: int, ticks: int | None = None) -> Decoding:
    """What reading ``context - 1`` tokens and one after them takes, in a state preallocated as the decoder does it.

    Arguments and errors as in ``training``.
    """
    with _fake(of, vocab, context, ticks) as (model, live), torch.no_grad():
        live.peak = live.now
        tokens_BT = torch.zeros(batch, context, dtype=torch.int64)
        state = model.eval().init_state(batch, context, ticks=ticks)
        for chunk in (tokens_BT[:, :-1], tokens_BT[:, -1:]):
            if chunk.shape[1]:
                state = model(chunk, state, logits_at="last").state
        return Decoding(sum(leaf.numel() * leaf.element_size() for leaf in leaves(state)), live.peak)


class Live(TorchDispatchMode):
    """Counts the bytes of the storages made under it that still exist (``now``), and their ``peak``.

    saved: the peak of those that ``keep``, a pack hook of ``saved_tensors_hooks``, was given and that still exist.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.saved = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._kept: set[int] = set()
        self._kept_now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = args[0] if args and isinstance(args[0], FakeTensor) else None
        if asked is not None and func is torch.ops.aten._local_scalar_dense.default:
            return True if asked.dtype == torch.bool else 0
        if asked is not None and func is torch.ops.aten.nonzero.default:
            out = asked.new_empty((asked.numel(), asked.dim()), dtype=torch.int64)
        else:
            out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self._watch(each.untyped_storage())
        return out

    def keep(self, tensor: Tensor, but: Container[int] = ()) -> Tensor:
        """Note that a tensor is kept for the backward pass, unless its storage is among ``but``."""
        storage = tensor.untyped_storage()
        if storage._cdata not in but and storage._cdata not in self._kept:
            self._watch(storage)  # if it was made elsewhere, so that its end is noticed
            self._kept.add(storage._cdata)
            self._kept_now += storage.nbytes()
            self.saved = max(self.saved, self._kept_now)
        return tensor

    def _watch(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self._known:
            self._known[place] = weakref.ref(storage, lambda _: self._gone(place, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, place: int, size: int) -> None:
        self.now -= size
        del self._known[place]
        if place in self._kept:
            self._kept.remove(place)
            self._kept_now -= size


def _place(tensor: Tensor) -> int:
    """Which storage a tensor lives in."""
    return tensor.untyped_storage()._cdata


def _same(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _fake(of: Spec, vocab: int, context: int, ticks: int | None) -> Iterator[tuple[LanguageModel, Live]]:
    """The model built of fake tensors, at a tick budget, and the mode that counts them."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
            model = of.build(vocab)
            table = model.embed.positions
            if table is not None and context > table.num_embeddings:  # the model asks for numbers to find that out
                raise UserError(
                    f"a context of {context} does not fit the {table.num_embeddings} learned positions; "
                    "raise max_positions"
                )
            if ticks is not None:
                model.forward = partial(model.forward, ticks=ticks)  # type: ignore[method-assign]
            yield model, live
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"the memory of '{of.kind}' cannot be measured: its shapes depend on numbers ({error.func}); "
            "use masks instead, so that shapes follow from the length alone"
        ) from error
