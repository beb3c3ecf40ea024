"""What machines with an external memory share in their hand-written loops: heads that compare, and softplus.

Suffixes as in mixers.ntm; C the tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepladder.models.addressing import EPS

softmax_slope = torch.ops.aten._softmax_backward_data.out
"""(gradient of y, y, axis, dtype, grad_input): the gradient of x where y = softmax x. All arrays contiguous."""


class Compare:
    """softmax over slots of strength x cosine(key, slot), for Q heads: models.addressing.content.

    It holds the arrays that a token needs; ``forward`` or ``back`` is called token after token.
    """

    def __init__(self, memory_BNM: Tensor, heads: int) -> None:
        batch, slots, _ = memory_BNM.shape
        new = memory_BNM.new_empty
        self.products_BQN, self.w_BQN = new(batch, heads, slots), new(batch, heads, slots)
        self.slot_BN, self.key_BQ = new(batch, slots), new(batch, heads)
        self.slot_B1N, self.key_BQ1 = self.slot_BN[:, None], self.key_BQ[..., None]
        self.eps = new(1, 1).fill_(EPS)
        self.dsimilar_BNQ = self.w_BQN.transpose(1, 2)
        self.v_B1N, self.scaled_BQ1 = new(batch, 1, slots), new(batch, heads, 1)
        self.v_BN1 = self.v_B1N.transpose(1, 2)

    def forward(self, memory_BNM: Tensor, memory_BMN: Tensor, key_BQM: Tensor, strength_BQ: Tensor) -> Tensor:
        """The weights, in an array that the next call fills anew. Lengths are sqrt(|v|^2 + EPS)."""
        torch.bmm(key_BQM, memory_BMN, out=self.products_BQN)
        torch.linalg.vector_norm(memory_BNM, dim=-1, out=self.slot_BN)
        torch.linalg.vector_norm(key_BQM, dim=-1, out=self.key_BQ)
        torch.addcmul(self.eps, self.slot_BN, self.slot_BN, out=self.slot_BN).rsqrt_()
        torch.addcmul(self.eps, self.key_BQ, self.key_BQ, out=self.key_BQ).rsqrt_().mul_(strength_BQ)
        self.products_BQN.mul_(self.slot_B1N).mul_(self.key_BQ1)
        return torch.softmax(self.products_BQN, -1, out=self.w_BQN)

    @staticmethod
    def ready(memory_CBNM: Tensor, key_CBQM: Tensor, strength_CBQ: Tensor) -> list[Tensor]:
        """What ``back`` is given, for a chunk; the weights come first."""
        short_CBN, short_CBQ = (
            (torch.linalg.vector_norm(each, dim=-1).square_() + EPS).rsqrt_() for each in (memory_CBNM, key_CBQM)
        )
        strong = strength_CBQ[..., None]
        inverse = short_CBQ[..., None] * short_CBN[:, :, None]
        cosine = (key_CBQM @ memory_CBNM.transpose(2, 3)).mul_(inverse)
        scale, key_scale = inverse.mul_(strong), strong * short_CBQ.square_()[..., None]
        w_CBQN = (cosine * strong).softmax(-1)
        return [
            w_CBQN,
            cosine,
            scale,
            key_scale,
            short_CBN.square_()[:, :, None],
            key_CBQM,
            strong.transpose(2, 3),
            memory_CBNM,
        ]

    def back(
        self,
        dw_BQN: Tensor,
        ready: Sequence[Tensor],
        dstrength_BQ: Tensor,
        dstrength_BQ1: Tensor,
        dkey_BQM: Tensor,
        dmemory_BNM: Tensor,
    ) -> None:
        """Fills dstrength (of which the fourth argument is a view) and dkey, adds to dmemory. dw must be contiguous."""
        w, cosine, scale, key_scale, shorter, key, strength_B1Q, memory = ready
        dsimilar, product = self.w_BQN, self.products_BQN
        softmax_slope(dw_BQN, w, -1, w.dtype, grad_input=dsimilar)
        torch.sum(torch.mul(dsimilar, cosine, out=product), -1, out=dstrength_BQ)
        dsimilar.mul_(scale)
        torch.mul(dstrength_BQ1, key_scale, out=self.scaled_BQ1)
        torch.bmm(dsimilar, memory, out=dkey_BQM).addcmul_(key, self.scaled_BQ1, value=-1)
        dmemory_BNM.baddbmm_(self.dsimilar_BNQ, key)
        torch.bmm(strength_B1Q, product, out=self.v_B1N).mul_(shorter)
        dmemory_BNM.addcmul_(memory, self.v_BN1, value=-1)


def softplus_(x: Tensor) -> Tensor:
    """softplus in place."""
    return torch.ops.aten.softplus.out(x, out=x)


def softplus_slope(y: Tensor) -> Tensor:
    """The slope of softplus where its value is y; as in torch, it is linear beyond 20."""
    return torch.where(y > 20, 1.0, -torch.expm1(-y))
