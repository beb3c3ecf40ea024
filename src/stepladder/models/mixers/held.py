"""Attention inside a loop whose tokens halt one by one: a halted token shows the keys and values of its last tick."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepladder.models.base import Context
from stepladder.models.mixers.attention import Attention, Cache, FixedCache, attend, extend, visible


@dataclass(frozen=True)
class Holding:
    """What a tick hands to a layer, and the layer to the same layer of the next tick.

    cache: what the tokens before this call show at this tick. k, v: (B, T, G, K), what those of this call showed at the
    tick before, None at the first. running: (B, T), which of them execute this tick; None = all. rows: (R,), the rows
    that the layer's input consists of; None = all.
    """

    cache: Cache | FixedCache | None
    k_BTGK: Tensor | None = None
    v_BTGK: Tensor | None = None
    running_BT: Tensor | None = None
    rows_R: Tensor | None = None

    def skipped(self) -> Holding:
        """After a tick that no token of the call executes."""
        assert self.k_BTGK is not None
        assert self.v_BTGK is not None
        return Holding(extend(self.cache, self.k_BTGK, self.v_BTGK)[1], self.k_BTGK, self.v_BTGK)


class HeldAttention(Attention):
    """Attention whose state is a ``Holding``: keys and values of tokens that do not run stay as they are.

    At tick k a query finds, for every token j of its past, the keys and values of tick min(k, n_j), n_j being the ticks
    that j executed. They depend on j's own run alone, so it does not matter who asks, when, or in which batch; and as
    they are copied, not computed anew, whatever tells ticks apart (FiLM) cannot alter them.
    """

    def forward(self, x_RTD: Tensor, state: Holding, ctx: Context) -> tuple[Tensor, Holding]:
        q, k, v = self.heads_of(x_RTD, ctx)
        rows = state.rows_R
        if state.k_BTGK is not None and state.v_BTGK is not None:
            if rows is not None:
                k, v = (old.index_copy(0, rows, new) for old, new in ((state.k_BTGK, k), (state.v_BTGK, v)))
            elif state.running_BT is not None:
                runs = state.running_BT[..., None, None]
                k, v = torch.where(runs, k, state.k_BTGK), torch.where(runs, v, state.v_BTGK)
        past, cache = extend(state.cache, k, v)
        keys, values = cache.k_BSGK, cache.v_BSGK
        if rows is not None:
            keys, values = keys.index_select(0, rows), values.index_select(0, rows)
            past = None if past is None else past.index_select(0, rows)
        mask = None
        if ctx.packed or past is not None:
            here_T = torch.arange(x_RTD.shape[1], device=x_RTD.device)
            mask = visible(past, here_T, ctx.positions_BT, keys.shape[1])
        y_RTD = self.out(attend(q, keys, values, mask, causal=mask is None))
        return y_RTD, Holding(cache, k, v)
