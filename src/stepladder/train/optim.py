"""AdamW with declared decay groups, and the learning rate as a pure function of progress."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.models.lm import LanguageModel
from stepladder.run import TrainConfig


def learning_rate(train: TrainConfig, progress: float) -> float:
    """The rate at ``progress`` in [0, 1] of the budget: a linear rise, then cosine, wsd or constant.

    It is continuous, ends at ``lr * min_lr`` (constant: at ``lr``) and stays there beyond 1. wsd
    (warm-up, stable, decay): flat, then linear over the last ``decay`` of the budget.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < train.warmup:
        return train.lr * progress / train.warmup
    if train.schedule == "constant":
        return train.lr
    if train.schedule == "cosine":
        falling = (progress - train.warmup) / (1 - train.warmup)
        shape = 0.5 * (1 + math.cos(math.pi * falling))
    else:
        start = max(1 - train.decay, train.warmup)
        shape = 1 - max(0.0, progress - start) / (1 - start)
    return train.lr * (train.min_lr + (1 - train.min_lr) * shape)


def adamw(model: LanguageModel, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019) over all parameters of ``model``, fused into one kernel.

    Matrices decay. Vectors and scalars (norms, biases, gates) do not, and neither do embeddings, also where a tied
    head uses them: their rows are seen too rarely for a pull at every step.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
    kept = [p for p in parameters if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        fused=True,
    )


def optimizer_tensors(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: ``<parameter>/<entry>``; parameters never updated have none."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}/{entry}": value for p, entries in optimizer.state.items() for entry, value in entries.items()
    }


def restore_optimizer(model: LanguageModel, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave, bit by bit; a name or shape that does not fit is a UserError."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for label, value in tensors.items():
        name, _, entry = label.rpartition("/")
        if name not in parameters or (value.ndim and value.shape != parameters[name].shape):
            raise UserError(f"the optimizer state '{label}' fits no parameter of this model; resume its own run")
        # Cloned: a tensor that lives in a mapped file is neither writable nor aligned as the kernels like it.
        # Counters of a fused AdamW live with their parameter, so everything goes to the parameter's device.
        optimizer.state[parameters[name]][entry] = value.clone().to(parameters[name].device)


def never_updated(model: LanguageModel, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of parameters that have had no gradient, or only zeros, in every update so far."""
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and not (p in optimizer.state and bool(optimizer.state[p]["exp_avg"].any()))
    ]
