"""Causal attention over a window of the last tokens, with persistent tokens that every query sees.

A query of position p sees the keys of positions p - window + 1 .. p of its document, and N_p learned pairs of a key and
a value that no input changes (Titans' persistent memory; Sukhbaatar et al., 2019). Queries are taken in blocks of a
window, so the cost is linear in the tokens, and the state is the last window - 1 keys and values, however long the
sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.layers import linear, rotate


@dataclass(frozen=True)
class Recent:
    """Keys and values of the last window - 1 tokens, 0 where they are of an earlier document. (B, W - 1, 2, H, K)."""

    pairs: Tensor


class WindowAttention(Part):
    """Softmax attention in a window, rotary positions; keys of persistent tokens are not turned."""

    def __init__(self, width: int, heads: int, window: int, persistent: int, rope_base: float, gain: float) -> None:
        super().__init__()
        if width % heads or width // heads % 2:
            raise UserError(f"{heads} heads do not divide width {width} into even parts; change width or heads")
        self.heads, self.head_width, self.window, self.rope_base = heads, width // heads, window, rope_base
        self.project = linear(width, 3 * width)
        self.persistent = nn.Parameter(torch.randn(2, heads, persistent, self.head_width)) if persistent else None
        self.out = linear(width, width, gain)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        batch, tokens, _ = x_BTD.shape
        qkv = self.project(x_BTD).view(batch, tokens, 3, self.heads, self.head_width)
        turned = [rotate(qkv[:, :, i].transpose(1, 2), ctx.positions_BT, self.rope_base) for i in (0, 1)]
        q_BHTK, k_BHTK, v_BHTK = *turned, qkv[:, :, 2].transpose(1, 2)
        back, size = self.window - 1, min(self.window, tokens)
        pairs = torch.stack((k_BHTK, v_BHTK), dim=2).movedim(3, 1)  # (B, T, H, 2, K)
        past = pairs.new_zeros(batch, back, *pairs.shape[2:]) if state is None else state.pairs.to(pairs.dtype)
        # What a finished document left behind is filled, so that not even an infinity gets through.
        gone_BW = ctx.positions_BT[:, :1] < torch.arange(back, 0, -1, device=x_BTD.device)
        full = torch.cat((past.masked_fill(gone_BW[..., None, None, None], 0.0), pairs), dim=1)

        blocks = -(-tokens // size)
        rest = blocks * size - tokens
        q = F.pad(q_BHTK, (0, 0, 0, rest)).unflatten(2, (blocks, size)).transpose(1, 2)
        keys = F.pad(full, (0, 0) * 3 + (0, rest)).unfold(1, back + size, size)  # (B, blocks, H, 2, K, W)
        k, v = keys.transpose(-1, -2).unbind(3)
        # How far back a key lies, and how far back a query may look; padding looks at itself.
        place_Q = torch.arange(size, device=x_BTD.device)
        lag_QW = back + place_Q[:, None] - torch.arange(back + size, device=x_BTD.device)
        reach_BbQ = F.pad(ctx.positions_BT, (0, rest)).clamp(max=back).unflatten(1, (blocks, size))
        mask = (lag_QW >= 0) & (lag_QW <= reach_BbQ[..., None])
        if self.persistent is not None:
            fixed = self.persistent.to(k.dtype).expand(batch, blocks, -1, -1, -1, -1)
            k, v = torch.cat((fixed[:, :, 0], k), dim=3), torch.cat((fixed[:, :, 1], v), dim=3)
            mask = F.pad(mask, (fixed.shape[4], 0), value=True)
        y = F.scaled_dot_product_attention(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask.flatten(0, 1)[:, None]
        )
        y_BTD = y.unflatten(0, (batch, blocks)).transpose(2, 3).flatten(1, 2)[:, :tokens].flatten(2)
        seen_BW = ctx.positions_BT[:, -1:] >= torch.arange(back - 1, -1, -1, device=x_BTD.device)
        carried = full[:, tokens:].masked_fill(~seen_BW[..., None, None, None], 0.0)
        return self.out(y_BTD), Recent(carried)

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        """The window does not grow, so ``capacity`` means nothing here."""
        shape = (batch, self.window - 1, self.heads, 2, self.head_width)
        return Recent(torch.zeros(shape, device=device, dtype=dtype))

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """Scores as computed: blocks of queries, padding included, against two windows and the persistent keys."""
        width, size = self.heads * self.head_width, min(self.window, context)
        persistent = 0 if self.persistent is None else self.persistent.shape[2]
        queries = -(-context // size) * size
        scores = 4 * queries * (self.window - 1 + size + persistent) * width
        flops = 2 * (self.project.weight.numel() + self.out.weight.numel()) + scores / context
        return Cost(self.own_params(), flops, 2 * (self.window - 1) * width * self.itemsize())
