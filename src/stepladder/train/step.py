"""One optimizer update, or a refusal that leaves no trace in the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from stepladder.data.stream import Batch
from stepladder.models.base import IGNORE, Images, detach_state
from stepladder.models.halting import Halting
from stepladder.models.lm import LanguageModel
from stepladder.models.noise import row_keys
from stepladder.run import TrainConfig
from stepladder.train.loss import objective
from stepladder.train.optim import set_rate

HALTING = ("act_inner_steps", "act_expected_steps", "act_executed_steps")
"""What metric lines tell of a model that decides its ticks: the most that any token of the batch took; the expected
number, sum_k k w_k; and those that a token executed before it stopped, the last two as means over supervised tokens."""


class OutOfMemory(Exception):
    """The rows of a micro-batch do not fit into memory; what the step had made is given up."""


@dataclass(frozen=True)
class Taken:
    """What a step did. Sums are over the step's ``supervised`` tokens; "nll" is the likelihood's.

    grad_norm: of all gradients together, before clipping. grad_norms: of parts worth watching, likewise: "halting",
    all parameters of halting policies, where a model has any; 0 if nothing reaches them.
    halting: of a model that decides its ticks, what HALTING names, times ``supervised``: means of windows weigh tokens.
    refused: why there was no update, or None. rows: rows of the batch whose loss is not finite. parameters: names of
    those whose gradient is not finite.
    """

    supervised: int
    sums: dict[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    grad_norms: dict[str, float] = field(default_factory=dict)
    halting: dict[str, float] = field(default_factory=dict)
    refused: str | None = None
    rows: list[int] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats of a supervised token; NaN if there was none."""
        return self.sums["nll"] / self.supervised if self.supervised else math.nan


def gradient_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    train: TrainConfig,
    *,
    lr: float,
    noise: int,
    limit: float = math.inf,
) -> Taken:
    """Accumulate the gradient of the mean loss over the batch's supervised tokens, clip it, update.

    The tokens are counted before the first backward pass, so micro-batches weigh by what they hold. Nothing at all is
    updated if the batch has no supervised token, if the loss or the gradient is not finite, or if the likelihood
    exceeds ``limit`` nats a token. ``noise`` is the integer key of the model's stochastic parts at this step.
    With ``train.horizon`` H, rows are walked H tokens at a time: the state goes on and the graph ends (truncated
    backpropagation through time), so the loss is that of whole rows and a token's gradient reaches back < H tokens.
    ``OutOfMemory`` before the update leaves everything as it was.
    """
    supervised = int((batch.targets != IGNORE).sum())
    if not supervised:
        return Taken(0, refused="no supervised token in the batch")
    device = model.embed.tokens.weight.device
    tokens, targets, documents, images = tensors(batch, device)
    keys = row_keys(noise, len(tokens), device)  # for all rows at once: micro-batches must not repeat their noise
    micro, horizon = train.at_once(len(tokens)), train.horizon or tokens.shape[1]
    decides = any(isinstance(module, Halting) and module.min_ticks is not None for module in model.modules())
    inner, expected, executed = (torch.zeros((), device=device) for _ in HALTING)

    optimizer.zero_grad(set_to_none=True)
    total, sums, nll_by_row = torch.zeros((), device=device), dict[str, Tensor](), []
    with _room(optimizer):
        for rows in _slices(len(tokens), micro):
            state, keys_B, nll_B = None, keys[rows], torch.zeros(len(keys[rows]), device=device)
            for columns in _slices(tokens.shape[1], horizon):
                targets_BT = targets[rows, columns]
                with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                    output = model(
                        tokens[rows, columns],
                        state,
                        targets=targets_BT,
                        documents=documents[rows, columns],
                        key=keys_B if state is None else None,
                        recompute=train.recompute,
                        trace="ticks" if decides else False,
                        **({} if images is None else {"images": images.at(rows, columns)}),
                    )
                    loss, parts = objective(output, targets_BT, train.losses)
                if loss.requires_grad:
                    (loss / supervised).backward()
                if decides:
                    scored_BT, ticks_BT = targets_BT != IGNORE, output.trace["ticks"].to(inner)
                    inner = torch.maximum(inner, ticks_BT.max())
                    expected = expected + torch.where(scored_BT, output.trace["ponder"].to(inner), 0.0).sum()
                    executed = executed + torch.where(scored_BT, ticks_BT, 0.0).sum()
                state = detach_state(output.state)
                total = total + loss.detach()
                sums = {name: sums.get(name, 0.0) + part for name, part in parts.items()}
                nll_B = nll_B + output.nll_BT.detach().sum(1)
            nll_by_row.append(nll_B)

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    watched = {name: get_total_norm(grads).to(norm) for name, grads in _watched(model).items()}
    told = dict(zip(HALTING, (inner * supervised, expected, executed), strict=True)) if decides else {}
    measured = [*sums.values(), *watched.values(), *told.values(), total, norm]
    *numbers, whole, size = torch.stack(measured).tolist()  # the step's one synchronisation
    found = iter(numbers)
    of_sums, of_norms, of_ticks = ({name: next(found) for name in names} for names in (sums, watched, told))
    taken = Taken(supervised, of_sums, size, of_norms, of_ticks)
    refusal: dict[str, Any] = {}
    if not math.isfinite(whole):
        terms = ", ".join(name for name, value in taken.sums.items() if not math.isfinite(value))
        wrong = (~torch.cat(nll_by_row).isfinite()).nonzero()[:, 0].tolist()
        refusal = {"refused": f"the loss is {whole} in {terms or 'total'}", "rows": wrong}
    elif not math.isfinite(size):
        named = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
        bad = [name for name, gradient in named if not bool(gradient.isfinite().all())]
        refusal = {"refused": f"the gradient norm is {size}", "parameters": bad}
    elif taken.loss > limit:
        refusal = {"refused": f"a spike: the loss of {taken.loss:.4g} exceeds {limit:.4g}"}
    if refusal:
        optimizer.zero_grad(set_to_none=True)
        return replace(taken, **refusal)
    clip_grads_with_norm_(parameters, train.clip, norm)
    set_rate(optimizer, lr)
    optimizer.step()
    return taken


@contextmanager
def _room(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; that of a CPU has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        optimizer.zero_grad(set_to_none=True)
        raise OutOfMemory(str(error).strip().splitlines()[0]) from error


def tensors(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Images | None]:
    """Tokens, targets, documents and images of a batch, on a device."""
    shown = () if batch.images is None else (batch.images.pixels, batch.images.slots)
    arrays = (batch.tokens, batch.targets, batch.documents, *shown)
    tokens, targets, documents, *images = (torch.from_numpy(array).to(device) for array in arrays)
    return tokens, targets, documents, Images(*images) if images else None


def _slices(whole: int, part: int) -> Iterator[slice]:
    return (slice(first, first + part) for first in range(0, whole, part))


def _watched(model: LanguageModel) -> dict[str, list[Tensor]]:
    """The gradients that are reported on their own; none in the list where nothing reached the parameters."""
    policies = (module for module in model.modules() if isinstance(module, Halting))
    parameters = [p for policy in policies for p in policy.parameters()]
    return {"halting": [p.grad for p in parameters if p.grad is not None]} if parameters else {}
