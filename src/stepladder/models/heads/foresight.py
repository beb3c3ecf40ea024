"""The contrastive term of a planner (FCL): a plan should tell the chunks to come from those that have been.

    v_c = norm(b_c U)      f_j = norm(mean of W h over chunk j)      InfoNCE of v_{j-d} with f_j, d = 1 .. ``future``

where b_c is the belief at the start of chunk c; van den Oord et al., 2018. Told where chunk j ends, times the chunk's
length; a mean over d. Differs from the ancestor in its negatives: the ``negatives`` chunks of the same document before
j, where the ancestor takes all chunks of the batch, later ones too. So a term hears neither batch-mates nor the future.

Suffixes as in models.base, and: K plans, E chunks that end in a call, N negatives, d the distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.models.base import Context, Cost
from stepladder.models.heads.belief import rows, segment_sums
from stepladder.models.layers import linear


@dataclass(frozen=True)
class Remembered:
    """Sum of W h over the chunk so far; f of the last N chunks, v of the last ``future`` ones, the newest last."""

    sums_BD: Tensor
    f_BND: Tensor
    v_BdD: Tensor


class Foresight(nn.Module):
    """See the module. ``temperature`` divides the cosines."""

    def __init__(self, width: int, plans: int, chunk: int, future: int, negatives: int, temperature: float) -> None:
        super().__init__()
        self.width, self.chunk, self.future, self.negatives = width, chunk, future, negatives
        self.temperature = temperature
        self.plan = nn.Parameter(torch.randn(plans * width) * 0.02)  # a vector: the optimizer does not decay it
        self.summary = linear(width, width)

    def forward(
        self,
        h_BTD: Tensor,
        chosen_BTK: Tensor,
        boundary_BT: Tensor,
        anew_BT: Tensor,
        order_BT: Tensor,
        state: Remembered,
        ctx: Context,
    ) -> tuple[Tensor, Remembered]:
        """The term (B, T) and what to carry on.

        chosen: the belief that a token's chunk began with, as known before the token. anew: first tokens of chunks.
        order: where a chunk ends, its number in the document, from 0.
        """
        wide, tokens = state.sums_BD.dtype, h_BTD.shape[1]
        mine_BTD = F.linear(h_BTD.to(wide), self.summary.weight.to(wide))
        first_BD = state.sums_BD.masked_fill(anew_BT[:, :1], 0.0)
        sums_BTD = segment_sums(
            torch.cat((mine_BTD[:, :1] + first_BD[:, None], mine_BTD[:, 1:]), 1), anew_BT, self.chunk + 1
        )
        count_BT = boundary_BT.cumsum(1)
        slots = -(-tokens // self.chunk)
        number = torch.arange(1, slots + 1, device=h_BTD.device).expand(len(h_BTD), -1)
        index_BE = torch.searchsorted(count_BT, number.contiguous()).clamp(max=tokens - 1)
        f_BED = F.normalize(rows(sums_BTD, index_BE), dim=-1)
        plan_KD = self.plan.to(wide).unflatten(0, (chosen_BTK.shape[2], -1))
        v_BED = F.normalize((rows(chosen_BTK, index_BE).exp()[..., None] * plan_KD).sum(2), dim=-1)
        f_BSD, v_BSD = torch.cat((state.f_BND, f_BED), 1), torch.cat((state.v_BdD, v_BED), 1)

        order_BE = order_BT.gather(1, index_BE)
        back_N = torch.arange(self.negatives, -1, -1, device=h_BTD.device)  # the positive is 0 chunks back, and last
        mine_BEN = back_N <= order_BE[..., None]
        # A fill on what is multiplied: chunks of a finished document, be they infinite, leave no slope either.
        told_BEND = f_BSD.unfold(1, self.negatives + 1, 1).transpose(2, 3).masked_fill(~mine_BEN[..., None], 0.0)
        total_BE = torch.zeros_like(told_BEND[..., 0, 0])
        for distance in range(1, self.future + 1):
            known_BE = order_BE >= distance
            place = self.future - distance
            anchor_BED = v_BSD[:, place : place + slots].masked_fill(~known_BE[..., None], 0.0)
            cosine_BEN = (told_BEND * anchor_BED[:, :, None]).sum(-1) / self.temperature
            miss_BE = -cosine_BEN.masked_fill(~mine_BEN, -torch.inf).log_softmax(-1)[..., -1]
            total_BE = total_BE + torch.where(known_BE, miss_BE, 0.0)
        mean_BE = self.chunk * total_BE / order_BE.clamp(1, self.future)
        term_BT = rows(mean_BE[..., None], (count_BT - 1).clamp(min=0))[..., 0]

        last_B1 = count_BT[:, -1:]
        kept = [
            rows(each, last_B1 + torch.arange(size, device=h_BTD.device))
            for each, size in ((f_BSD, self.negatives), (v_BSD, self.future))
        ]
        return torch.where(boundary_BT, term_BT, 0.0), Remembered(sums_BTD[:, -1], *kept)

    def init_state(self, like_BK: Tensor) -> Remembered:
        """Zeros, which are never read."""
        new = like_BK.new_zeros
        batch = len(like_BK)
        return Remembered(
            new(batch, self.width), new(batch, self.negatives, self.width), new(batch, self.future, self.width)
        )

    def cost(self, size: int) -> Cost:
        """FLOPs and state bytes, ``size`` a number."""
        return Cost(0, 2 * self.summary.weight.numel(), (1 + self.negatives + self.future) * self.width * size)
