"""What a head is: hidden states to logits or to the likelihood of targets, with a state if it needs one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Cost, State


class Head(nn.Module):
    """Base of the heads. One that carries nothing writes ``logits`` and ``nll``; one with a state, ``forward``."""

    def forward(
        self, h_BTD: Tensor, state: State, ctx: Context, targets_BT: Tensor | None, where: str | Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, State]:
        """Logits, where no targets are given, at ``where`` (see LanguageModel.forward); else nll_BT; and the state."""
        if targets_BT is not None:
            return None, self.nll(h_BTD, targets_BT), state
        return self.logits(wanted(h_BTD, where)), None, state

    def logits(self, h_D: Tensor) -> Tensor:
        """(..., D) -> (..., V), float32 or wider."""
        raise NotImplementedError

    def nll(self, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Negative log-likelihood (B, T) in nats, 0 at IGNORE."""
        raise NotImplementedError

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        """A start-of-sequence state; None for a head that carries nothing."""
        return None

    def cost(self) -> Cost:
        """Parameters, FLOPs per token and state bytes."""
        raise NotImplementedError


def wanted(x_BTD: Tensor, where: str | Tensor | None) -> Tensor:
    """The positions whose logits are wanted: (B, T, D), (B, 1, D) or (N, D)."""
    if where is None:
        return x_BTD
    if isinstance(where, Tensor):
        return x_BTD[where]
    if where == "last":
        return x_BTD[:, -1:]
    raise UserError(f"logits_at={where!r}: give None, 'last' or a boolean mask of shape (batch, length)")
