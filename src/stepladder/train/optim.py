"""AdamW and Muon with declared groups, and the learning rate as a pure function of progress."""

from __future__ import annotations

import math
from collections.abc import Set

import torch
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.models.encoders import Encoder
from stepladder.models.heads.base import Head
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


MUON_LR = 0.02
"""Muon's learning rate unless ``train.muon_lr`` says otherwise."""


def optimizer(model: LanguageModel, train: TrainConfig) -> torch.optim.Optimizer:
    """What ``train.optimizer`` names, over all trainable parameters of ``model``, each in exactly one group."""
    return MuonAdamW(model, train) if train.optimizer == "muon" else adamw(model, train)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate, where AdamW's is ``lr``: Muon's keeps its ratio to it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("ratio", 1.0)


def hidden_matrices(model: LanguageModel) -> list[nn.Parameter]:
    """The parameters with the role of a map between hidden states: those that Muon is for.

    They are the weights of ``nn.Linear`` modules, which is what declares the role; not of the head, whose outputs are
    tokens, not inside the image encoder, whose inputs are pixels, and none with one input or output, which is a
    vector. A table (embeddings, first contents of a memory, kernels of a convolution) is no map, whatever its shape.
    """
    outer = [module for module in model.modules() if isinstance(module, Head | Encoder | nn.Embedding)]
    left_out = {id(p) for module in outer for p in module.parameters()}
    maps = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and min(m.weight.shape) > 1}
    return [p for p in model.parameters() if p.requires_grad and id(p) in maps - left_out]


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for hidden matrices and AdamW for everything else, as one optimizer.

    Muon is torch's: Nesterov momentum 0.95, orthogonalised by five Newton-Schulz iterations in bfloat16, scaled by
    sqrt(max(1, rows / columns)). It takes two-dimensional parameters alone and needs no process group.
    """

    def __init__(self, model: LanguageModel, train: TrainConfig) -> None:
        matrices = hidden_matrices(model)
        if not matrices:
            raise UserError("Muon is for hidden matrices and this model has none; use train.optimizer: adamw")
        self._adamw = adamw(model, train, {id(p) for p in matrices})
        rate = train.muon_lr or MUON_LR
        self._muon = torch.optim.Muon(matrices, lr=rate, weight_decay=train.weight_decay, adjust_lr_fn="original")
        self._muon.param_groups[0]["ratio"] = rate / train.lr
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        # One state and one set of groups for all three: what is saved, restored or changed here is theirs.
        self._muon.state = self._adamw.state = self.state
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of both."""
        self._muon.step()
        self._adamw.step()


def adamw(model: LanguageModel, train: TrainConfig, without: Set[int] = frozenset()) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019) over all parameters of ``model``, fused into one kernel.

    without: the ``id`` of parameters that are somebody else's. Matrices decay. Vectors and scalars (norms, biases,
    gates) do not, and neither do embeddings, also where a tied head uses them: their rows are seen too rarely for a
    pull at every step.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in without]
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
    none = torch.zeros(())
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad
        and not any(bool(optimizer.state.get(p, {}).get(m, none).any()) for m in ("exp_avg", "momentum_buffer"))
    ]
