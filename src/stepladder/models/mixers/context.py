"""Memory as context (Titans' MAC): attention hears what the memory says, and the memory what attention says.

A document is cut into segments of ``chunk`` tokens, which are the memory's chunks too. With M_c the memory at the
start of token t's segment, and P persistent pairs of keys and values:

    h_t = norm( M_c(q_t) ),  q_t = silu(conv(W_q x))_t of length 1
    y_t = W_o attention of x_t over P, h_j and x_j, j <= t in the segment
    o_t = W ( norm(y_t) * silu( norm( M_t(q'_t) ) ) ),      (q', k, v, gates)_t from norm(y_t), M_t after the write of t

The memory at a segment's start hangs on all segments before, and so on their attention: segments are computed one
after the other.

Suffixes: B batch, T tokens, D model width, H heads, K head width, W tokens of a window, S keys at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.fast.chunks import Layout, Pick, blocks, unblocked
from stepladder.models.fast.decay import ShortConvolution
from stepladder.models.fast.fast_weights import Memory, Tokens, Weights, recall
from stepladder.models.fast.walk import Found
from stepladder.models.layers import linear, no_autocast, norm, rotate
from stepladder.models.mixers.join import normed
from stepladder.models.mixers.neural_memory import FastMemory


@dataclass(frozen=True)
class Carried:
    """The convolution's last inputs; the memory; keys and values of x and h in the open segment, else 0; F = 4K."""

    inputs_BLU: Tensor
    memory: Memory
    open_BHSF: Tensor


class MemoryAsContext(Part):
    """o as above. ``memory`` holds the network, its maps and gates, and how it is computed."""

    site: int = 0

    def __init__(
        self, width: int, memory: FastMemory, conv: int, persistent: int, rope_base: float, gain: float
    ) -> None:
        super().__init__()
        heads, head_width = memory.heads, memory.head_width
        if heads * head_width != width or head_width % 2:
            raise UserError(f"{heads} heads do not divide width {width} into even parts; change width or heads")
        self.memory, self.rope_base = memory, rope_base
        self.query, self.conv, self.heard_norm = linear(width, width), ShortConvolution(width, conv), norm(head_width)
        self.project, self.mix = linear(width, 3 * width), linear(width, width)
        self.persistent = nn.Parameter(torch.randn(2, heads, persistent, head_width)) if persistent else None
        self.norm, self.gate_norm, self.out = norm(width), norm(head_width), linear(width, width, gain)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        query_BTD, inputs_BLU = self.conv(self.query(x_BTD), None if state is None else state.inputs_BLU, ctx)
        q, k, v = (self._heads(each) for each in self.project(x_BTD).chunk(3, dim=-1))
        q, k = (rotate(each, ctx.positions_BT, self.rope_base) for each in (q, k))
        back = self.memory.chunk - 1
        past = None if state is None else state.open_BHSF.to(q.dtype)
        if past is not None:
            begun_B = ctx.positions_BT[:, 0] % self.memory.chunk
            past = past.masked_fill(_beside(begun_B, back), 0.0)  # of a finished segment nothing is left, not even NaN
        wide = torch.promote_types(q.dtype, torch.float32)
        asked = F.normalize(self._heads(query_BTD).to(wide), dim=-1)
        source = _Segments(self, asked, q, k, v, ctx, past)
        given = None if state is None else state.memory
        (read, y, pairs), memory = self.memory.walk(source, given, ctx, wide, f"memory{self.site}.norm")
        if past is None:
            past = pairs.new_zeros(*pairs.shape[:2], back, pairs.shape[3])
        carried = torch.cat((past, pairs), dim=2)[:, :, pairs.shape[2] :]
        carried = carried.masked_fill(_beside((ctx.positions_BT[:, -1] + 1) % self.memory.chunk, back), 0.0)
        gate_BTD = normed(self.gate_norm, read).transpose(1, 2).flatten(2)
        o_BTD = self.out(normed(self.norm, y[:, 0]) * F.silu(gate_BTD))
        return o_BTD, Carried(inputs_BLU, memory, carried)

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.memory.heads, -1)).transpose(1, 2)

    def pairs_of(self, heard_BHWK: Tensor, positions_BW: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what the memory said, by the same maps as those of x."""
        width = self.mix.weight.shape[0]
        h_BWD = normed(self.heard_norm, heard_BHWK).transpose(1, 2).flatten(2)
        k, v = (self._heads(each) for each in F.linear(h_BWD, self.project.weight[width:]).chunk(2, dim=-1))
        return rotate(k, positions_BW, self.rope_base), v

    def attend(self, q_BHWK: Tensor, pairs_BHSF: Tensor, mask_BWS: Tensor) -> Tensor:
        """y (B, W, D) over the keys and values of x and h, and the persistent ones."""
        k_x, v_x, k_h, v_h = pairs_BHSF.chunk(4, dim=-1)
        k, v = torch.cat((k_h, k_x), dim=2), torch.cat((v_h, v_x), dim=2)
        mask = torch.cat((mask_BWS, mask_BWS), dim=-1)
        if self.persistent is not None:
            fixed_k, fixed_v = self.persistent.to(k.dtype)[:, None].expand(-1, len(k), -1, -1, -1)
            k, v = torch.cat((fixed_k, k), dim=2), torch.cat((fixed_v, v), dim=2)
            mask = F.pad(mask, (fixed_k.shape[2], 0), value=True)
        q_BHWK = q_BHWK.contiguous()  # fused kernels ask for it, and a window of tokens is not
        y = F.scaled_dot_product_attention(q_BHWK, k, v, attn_mask=mask[:, None])
        return self.mix(y.transpose(1, 2).flatten(2))

    def tokens_of(self, y_BWD: Tensor, real_BW: Tensor, ctx: Context) -> Tokens:
        """What the memory is asked and told by the output of attention."""
        u_BWU, told_BWG = self.memory.project(normed(self.norm, y_BWD)).split(self.memory.sizes, dim=-1)
        with no_autocast(y_BWD.device):
            return self.memory.told(F.silu(u_BWU), told_BWG, real_BW)

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        """The state does not grow, so ``capacity`` means nothing here."""
        shape = (batch, self.memory.heads, self.memory.chunk - 1, 4 * self.memory.head_width)
        open_BHSF = torch.zeros(shape, device=device, dtype=dtype)
        return Carried(self.conv.start(batch, device, dtype), self.memory.start(batch, device, dtype), open_BHSF)

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """One document in every row, segment by segment."""
        width, chunk = self.mix.weight.shape[0], self.memory.chunk
        persistent = 0 if self.persistent is None else self.persistent.shape[2]
        maps = sum(layer.weight.numel() for layer in (self.query, self.project, self.mix, self.out))
        maps += self.memory.project.weight.numel() + 2 * width * width  # keys and values of h once more
        weights = sum(weight.numel() for weight in self.memory.first)
        scores = sum(
            count * 4 * size * (2 * size + persistent) * width
            for size, count in ((chunk, context // chunk), (context % chunk, 1))
        )
        flops = 2 * maps + 2 * weights + (scores + self.memory.scan_flops(context)) / context
        carried = ((len(self.conv.weight) - 1) + 4 * (chunk - 1)) * width * self.itemsize()
        carried += self.memory.state_numbers() * max(4, self.itemsize())
        return Cost(self.own_params(), flops, carried)


def _beside(tokens_B: Tensor, size: int) -> Tensor:
    """Of the last ``size`` tokens, those beside the last ``tokens_B``; (B, 1, size, 1)."""
    lag_S = torch.arange(size, 0, -1, device=tokens_B.device)
    return (lag_S > tokens_B[:, None])[:, None, :, None]


@dataclass(frozen=True)
class _Segments:
    """The tokens of the memory: what attention says, segment by segment. asked, q, k, v: (B, H, T, K), turned."""

    part: MemoryAsContext
    asked: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    ctx: Context
    past: Tensor | None

    def fresh(self, first: Weights, at: Layout) -> tuple[Tokens, Found]:
        """In blocks of at most a segment, each with the block before it."""
        positions_BT, count = self.ctx.positions_BT, self.q.shape[2]
        with no_autocast(self.q.device):
            heard = recall(first, self.asked)
        pairs = self._pairs(heard, positions_BT, self.k, self.v)
        document_BN = blocks(at.start_BT + 1, 1, at.size, at.size)
        real_BN = blocks(torch.ones_like(at.start_BT), 1, at.size, at.size).bool()
        same = (document_BN[:, :, None] == document_BN[:, None]) & real_BN[:, None]
        # Padding looks at itself.
        mask = (same | torch.eye(2 * at.size, dtype=torch.bool, device=same.device)).tril()[:, at.size :]
        y = self.part.attend(blocks(self.q, 2, 0, at.size), blocks(pairs, 2, at.size, at.size), mask)
        y_BTD = unblocked(y[:, None], count)[:, 0]
        tokens = self.part.tokens_of(y_BTD, torch.ones_like(positions_BT, dtype=torch.bool), self.ctx)
        return tokens, (y_BTD[:, None], pairs)

    def window(self, memory: Memory, pick: Pick, real_BW: Tensor, number: int) -> tuple[Tokens, Found]:
        positions_BW = pick(self.ctx.positions_BT[:, None])[:, 0]
        with no_autocast(self.q.device):
            heard = recall(memory.base, pick(self.asked))
        new = self._pairs(heard, positions_BW, pick(self.k), pick(self.v))
        size = new.shape[2]
        mask = torch.ones(size, size, dtype=torch.bool, device=new.device).tril().expand(len(new), -1, -1)
        pairs = new
        if number == 0 and self.past is not None:
            begun_B = self.ctx.positions_BT[:, 0] % self.part.memory.chunk
            pairs = torch.cat((self.past, new), dim=2)
            there = ~_beside(begun_B, self.past.shape[2])[:, 0, :, 0]
            mask = torch.cat((there[:, None].expand(-1, size, -1), mask), dim=2)
        y_BWD = self.part.attend(pick(self.q), pairs, mask)
        return self.part.tokens_of(y_BWD, real_BW, self.ctx), (y_BWD[:, None], new)

    def _pairs(self, heard: Tensor, positions_BW: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_h, v_h = self.part.pairs_of(heard, positions_BW)
        return torch.cat((k, v.to(k.dtype), k_h.to(k.dtype), v_h.to(k.dtype)), dim=-1)
