"""Causal multi-head attention (Vaswani et al., 2017) with grouped key/value heads (Ainslie et al., 2023).

Documents are contiguous, so the keys a query may see are an interval: its own row from its document's first token
to itself. With ``a`` the absolute index of a query in its row and ``p`` its position in the document, key ``j`` is
visible iff a - p <= j <= a. That one rule serves packing, left padding, prefill and decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.layers import linear, rotate


@dataclass(frozen=True)
class Cache:
    """Keys and values of the past; grows with every call. k, v: (B, S, G, K)."""

    k_BSGK: Tensor
    v_BSGK: Tensor


@dataclass(frozen=True)
class FixedCache:
    """A preallocated cache. ``length_B`` entries of each row are filled; the rest is masked, whatever it holds."""

    k_BSGK: Tensor
    v_BSGK: Tensor
    length_B: Tensor


class Attention(Part):
    """Softmax attention over the past of the same document.

    ``rope_base`` None leaves positions out (Kazemnejad et al., 2023), so order is heard through the mask alone.
    ``gain`` scales the initial output map (see layers.residual_gain).
    """

    def __init__(self, width: int, heads: int, kv_heads: int, rope_base: float | None, gain: float) -> None:
        super().__init__()
        for parts, what, whole in ((heads, "heads", f"width {width}"), (kv_heads, "key/value heads", f"{heads} heads")):
            if (width if what == "heads" else heads) % parts:
                raise UserError(f"{parts} {what} do not divide {whole}; choose a divisor")
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        if rope_base is not None and self.head_width % 2:
            raise UserError(f"rotary positions need an even head width, not {width}/{heads}; change width or heads")
        self.rope_base = rope_base
        self.project = linear(width, (heads + 2 * kv_heads) * self.head_width)
        self.out = linear(width, width, gain)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        q, k, v = self.heads_of(x_BTD, ctx)
        past, state = extend(state, k, v, spend=ctx.spend)
        mask = None
        if ctx.packed or past is not None:
            here_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
            mask = visible(past, here_T, ctx.positions_BT, state.k_BSGK.shape[1])
        return self.out(attend(q, state.k_BSGK, state.v_BSGK, mask, causal=mask is None)), state

    def heads_of(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, K), keys and values (B, T, G, K), positions told."""
        qkv = self.project(x_BTD).unflatten(-1, (-1, self.head_width))
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        if self.rope_base is not None:
            qk = rotate(qk.transpose(1, 2), ctx.positions_BT, self.rope_base).transpose(1, 2)
        q, k = qk.split((self.heads, self.kv_heads), dim=2)
        return q, k, v

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        return empty_cache(batch, capacity, self.kv_heads, self.head_width, device, dtype)

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """Scores are counted as computed: every query against every key, masked or not."""
        width = self.heads * self.head_width
        params = self.own_params()
        state = 2 * context * self.kv_heads * self.head_width * self.itemsize()
        return Cost(params, 2 * params + 4 * context * width, state)


def extend(state: State, k: Tensor, v: Tensor, *, spend: bool = False) -> tuple[Tensor | None, Cache | FixedCache]:
    """Append keys and values. Returns how many entries each row had (None at the start) and the new cache.

    spend: a preallocated cache may be written in place, see Context.
    """
    if state is None:
        return None, Cache(k, v)
    if isinstance(state, Cache):
        past = state.k_BSGK.new_full((k.shape[0],), state.k_BSGK.shape[1], dtype=torch.int64)
        return past, Cache(torch.cat((state.k_BSGK, k), 1), torch.cat((state.v_BSGK, v), 1))
    past, tokens, capacity = state.length_B, k.shape[1], state.k_BSGK.shape[1]
    if not torch.compiler.is_compiling() and int(past.max()) + tokens > capacity:
        raise UserError(
            f"{int(past.max()) + tokens} tokens exceed the state's capacity of {capacity}; "
            "call init_state with a larger capacity"
        )
    # If not spent, the state that was passed in stays good for a second, different continuation.
    put = Tensor.scatter_ if spend else Tensor.scatter
    index = (past[:, None] + torch.arange(tokens, device=k.device))[:, :, None, None]
    return past, replace(
        state,
        k_BSGK=put(state.k_BSGK, 1, index.expand_as(k), k.to(state.k_BSGK.dtype)),
        v_BSGK=put(state.v_BSGK, 1, index.expand_as(v), v.to(state.v_BSGK.dtype)),
        length_B=past + tokens,
    )


def empty_cache(
    batch: int, capacity: int, heads: int, head_width: int, device: torch.device, dtype: torch.dtype
) -> FixedCache:
    """A preallocated cache with nothing in it."""
    shape = (batch, capacity, heads, head_width)
    k, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
    return FixedCache(k, v, torch.zeros(batch, device=device, dtype=torch.int64))


def visible(past_B: Tensor | None, index_BQ: Tensor, positions_BQ: Tensor, size: int) -> Tensor:
    """Boolean mask (B, 1, Q, size): key j is in the query's document and not after it.

    past_B: tokens before this call, None for none. index_BQ: places of the queries in this call, (Q,) if they are
    the same in every row. positions_BQ: positions in the document. size: entries of the cache.
    """
    here = index_BQ if past_B is None else past_B[:, None] + index_BQ
    keys = torch.arange(size, device=positions_BQ.device)
    first = here - positions_BQ
    return ((keys >= first[..., None]) & (keys <= here[..., None]))[:, None]


def attend(q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Tensor | None, *, causal: bool = False) -> Tensor:
    """Softmax attention of Q queries over S keys, each key/value head shared by H/G query heads: (B, Q, H x K).

    mask: boolean (B, 1, Q, S), None for none; every query must see a key. causal: query i sees keys 0..i.
    """
    shared = q_BQHK.shape[2] // k_BSGK.shape[2]
    if shared > 1 and q_BQHK.shape[1] == 1:
        # Decoding: the query heads of one key/value head are as many queries of it, so nothing need be copied for them.
        q_BGHK = q_BQHK.squeeze(1).unflatten(1, (-1, shared))
        return F.scaled_dot_product_attention(
            q_BGHK, k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2), attn_mask=mask
        ).flatten(1)[:, None]
    k, v = (x if shared == 1 else x.repeat_interleave(shared, dim=2) for x in (k_BSGK, v_BSGK))
    y = F.scaled_dot_product_attention(
        q_BQHK.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=causal
    )
    return y.transpose(1, 2).flatten(2)
