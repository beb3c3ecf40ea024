"""The softmax head: a linear map to the vocabulary and its cross-entropy, in float32 or wider."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepladder.models.base import IGNORE, Cost
from stepladder.models.heads.base import Head
from stepladder.models.layers import linear

CHUNK = 2**24
"""At most this many logits exist at a time in the likelihood: 64 MiB in float32."""


class SoftmaxHead(Head):
    """Logits = W h, small at the start. ``tied`` is the embedding whose weight is used, None for an own one."""

    def __init__(self, width: int, vocab: int, tied: nn.Embedding | None = None) -> None:
        super().__init__()
        self.own = linear(width, vocab, gain=0.25) if tied is None else None
        self.tied = [] if tied is None else [tied]  # a list, so that the embedding keeps a single owner
        self.width, self.vocab = width, vocab

    def logits(self, h_D: Tensor) -> Tensor:
        """(..., D) -> (..., V), float32 or wider."""
        weight = self.own.weight if self.own is not None else self.tied[0].weight
        logits = F.linear(h_D, weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def nll(self, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Negative log-likelihood (B, T) in nats, 0 at IGNORE; unscored positions never reach the vocabulary."""
        flat_ND, targets_N = h_BTD.reshape(-1, self.width), targets_BT.reshape(-1)
        if torch.compiler.is_compiling():
            return self._nll(flat_ND, targets_N).view(targets_BT.shape)
        scored = (targets_N != IGNORE).nonzero()[:, 0]
        losses = self._nll(flat_ND.index_select(0, scored), targets_N.index_select(0, scored))
        return losses.new_zeros(targets_N.shape).index_copy(0, scored, losses).view(targets_BT.shape)

    def _nll(self, h_ND: Tensor, targets_N: Tensor) -> Tensor:
        rows = max(1, CHUNK // self.vocab)
        if len(h_ND) <= rows:
            return self._chunk(h_ND, targets_N)
        parts = zip(h_ND.split(rows), targets_N.split(rows), strict=True)
        return torch.cat(
            [checkpoint(self._chunk, h, y, use_reentrant=False, preserve_rng_state=False) for h, y in parts]
        )

    def _chunk(self, h_ND: Tensor, targets_N: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(h_ND), targets_N, ignore_index=IGNORE, reduction="none")

    def cost(self) -> Cost:
        params = 0 if self.own is None else self.own.weight.numel()
        return Cost(params, 2 * self.width * self.vocab)
