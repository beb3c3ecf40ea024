"""Low-rank adapters (LoRA; Hu et al., 2021): a trained model changes by W + scale B A, and W itself stays as it is.

They are parametrizations of *every* hidden matrix, whatever module holds it, so that whatever a kernel does with a
weight it does with the changed one, and no architecture is left out. Hidden matrices are the parameters of two and more
dimensions but embeddings and the head: maps, convolutions and learned initial states alike.

Differs from the paper in: all matrices have an adapter, not only those of attention; a matrix whose shorter side is
below the rank has one of its full rank; no dropout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stepladder.core.errors import UserError
from stepladder.models.layers import no_autocast
from stepladder.models.lm import LanguageModel

Places = list[tuple[nn.Module, str]]


class LowRank(nn.Module):
    """matrix (..., O, I) -> matrix + scale x up (..., O, R) @ down (..., R, I). ``up`` starts at 0: nothing changes."""

    def __init__(self, matrix: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        *lead, outputs, inputs = matrix.shape
        rank = min(rank, outputs, inputs)
        self.scale = scale
        self.down = nn.Parameter(torch.empty(*lead, rank, inputs, dtype=matrix.dtype, device=matrix.device))
        self.up = nn.Parameter(torch.zeros(*lead, outputs, rank, dtype=matrix.dtype, device=matrix.device))
        nn.init.normal_(self.down, std=1 / math.sqrt(inputs))

    def forward(self, matrix: Tensor) -> Tensor:
        """The matrix as the model uses it, in its own type under mixed precision, too."""
        with no_autocast(matrix.device):
            return matrix + self.scale * (self.up @ self.down)


def adapted_matrices(model: LanguageModel) -> list[tuple[nn.Parameter, Places]]:
    """Every hidden matrix once, with all places (module, attribute) that hold it."""
    inside_head = set(model.head.modules())
    found: dict[int, tuple[nn.Parameter, Places]] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module in inside_head:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                found.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    shown_to_head = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return [entry for number, entry in found.items() if number not in shown_to_head]


def add_adapters(model: LanguageModel, rank: int, scale: float, vocabulary: bool = False) -> None:
    """Freeze ``model`` and give every hidden matrix an adapter; the outputs stay as they were, to the bit.

    vocabulary: whether embeddings and the head, which have no adapters, stay trainable as they are. Random numbers come
    from torch's global generator. A rank that no matrix is large enough for is a UserError.
    """
    matrices = adapted_matrices(model)
    most = max((min(matrix.shape[-2:]) for matrix, _ in matrices), default=0)
    if rank >= most:
        raise UserError(
            f"adapters of rank {rank} would be no smaller than this model's matrices, whose shorter sides are {most} "
            "at most; give a smaller rank, or train all weights with --full"
        )
    model.requires_grad_(False)
    if vocabulary:
        model.embed.requires_grad_(True)
        model.head.requires_grad_(True)
    for matrix, places in matrices:
        adapter = LowRank(matrix, rank, scale)
        for module, name in places:  # a matrix that two modules share has one adapter, too
            parametrize.register_parametrization(module, name, adapter)


def merge_adapters(model: LanguageModel) -> None:
    """Turn the adapters of ``model`` into plain weights, all of them trainable; without adapters, nothing happens."""
    merged: dict[int, tuple[Tensor, Tensor]] = {}
    places = [(m, name) for m in model.modules() for name in getattr(m, "parametrizations", ())]
    if not places:
        return
    for module, name in places:
        original = module.parametrizations[name].original  # type: ignore[union-attr, index]
        merged.setdefault(id(original), (original, getattr(module, name).detach().clone()))
    for module, name in places:
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    with torch.no_grad():
        for original, value in merged.values():
            original.copy_(value)
    model.requires_grad_(True)
