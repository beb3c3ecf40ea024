"""Attention inside a loop whose tokens halt one by one: a halted token shows the keys and values of its last tick.

Keys and values are one tensor here, the G key heads first and the G value heads behind them: with few rows left running
in decoding, the number of small operations is what a tick costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepladder.core.errors import UserError
from stepladder.models.base import Context, State
from stepladder.models.layers import angles, turn
from stepladder.models.mixers.attention import Attention, attend, visible


@dataclass(frozen=True)
class Shown:
    """What past tokens show at one tick, (B, S, 2G, K); grows with every call."""

    kv_BSGK: Tensor


@dataclass(frozen=True)
class FixedShown:
    """The same, preallocated. ``length_B`` entries of each row are filled; the rest is masked, whatever it holds."""

    kv_BSGK: Tensor
    length_B: Tensor


@dataclass(frozen=True)
class Plan:
    """What is the same at every tick of a call: angles of positions, who sees whom, and where entries go.

    cos, sin: (B, T, 1, K/2), or None without rotary positions. mask: (B, 1, T, S), None for a plain causal one.
    place: (B, T, 1, 1) of new entries in a preallocated cache, else None. spend: whether they may go in in place.
    """

    cos: Tensor | None
    sin: Tensor | None
    mask: Tensor | None
    place: Tensor | None
    spend: bool

    def of(self, rows_R: Tensor) -> Plan:
        """Those of some rows, for queries and their keys; entries are always made for all rows."""
        cos, sin, mask = (
            each if each is None else each.index_select(0, rows_R) for each in (self.cos, self.sin, self.mask)
        )
        return replace(self, cos=cos, sin=sin, mask=mask)


@dataclass(frozen=True)
class Holding:
    """What a tick hands to a layer, and the layer to the same layer of the next tick.

    past: what the tokens before this call show at this tick. kv: (B, T, 2G, K), what those of this call showed at the
    tick before, None at the first. running: (B, T), which of them execute this tick; None = all. rows: (R,), the rows
    that the layer's input consists of, and ``plan`` is for; None = all.
    """

    past: Shown | FixedShown | None
    plan: Plan
    kv_BTGK: Tensor | None = None
    running_BT: Tensor | None = None
    rows_R: Tensor | None = None

    def skipped(self) -> Shown | FixedShown:
        """The past of the next call, after a tick that no token of this one executes."""
        assert self.kv_BTGK is not None
        return self.with_new(self.kv_BTGK)

    def with_new(self, kv_BTGK: Tensor) -> Shown | FixedShown:
        """The past and what the call's tokens show. A state that was passed in stays good unless it is spent."""
        if self.past is None:
            return Shown(kv_BTGK)
        if isinstance(self.past, Shown):
            return Shown(torch.cat((self.past.kv_BSGK, kv_BTGK), 1))
        assert self.plan.place is not None
        before, put = self.past.kv_BSGK, Tensor.scatter_ if self.plan.spend else Tensor.scatter
        after = put(before, 1, self.plan.place.expand_as(kv_BTGK), kv_BTGK.to(before.dtype))
        return replace(self.past, kv_BSGK=after, length_B=self.past.length_B + kv_BTGK.shape[1])


class HeldAttention(Attention):
    """Attention whose state is a ``Holding``: keys and values of tokens that do not run stay as they are.

    At tick k a query finds, for every token j of its past, the keys and values of tick min(k, n_j), n_j being the ticks
    that j executed. They depend on j's own run alone, so it does not matter who asks, when, or in which batch; and as
    they are copied, not computed anew, whatever tells ticks apart (FiLM) cannot alter them.
    """

    def plan(self, past: Shown | FixedShown | None, like_BTD: Tensor, ctx: Context) -> Plan:
        """What all ticks of a call share; too many tokens for a preallocated past are a UserError."""
        tokens, place, before = like_BTD.shape[1], None, None
        here_T = torch.arange(tokens, device=like_BTD.device)
        if isinstance(past, Shown):
            before = past.kv_BSGK.new_full((len(like_BTD),), past.kv_BSGK.shape[1], dtype=torch.int64)
        elif past is not None:
            before, capacity = past.length_B, past.kv_BSGK.shape[1]
            if not torch.compiler.is_compiling() and int(before.max()) + tokens > capacity:
                raise UserError(
                    f"{int(before.max()) + tokens} tokens exceed the state's capacity of {capacity}; "
                    "call init_state with a larger capacity"
                )
            place = (before[:, None] + here_T)[:, :, None, None]
        mask = None
        if ctx.packed or past is not None:
            size = 0 if past is None else past.kv_BSGK.shape[1]
            size += 0 if isinstance(past, FixedShown) else tokens
            mask = visible(before, here_T, ctx.positions_BT, size)
        if self.rope_base is None:
            return Plan(None, None, mask, place, ctx.spend)
        cos, sin = angles(ctx.positions_BT, self.head_width, self.rope_base, like_BTD.dtype)
        return Plan(cos[:, :, None], sin[:, :, None], mask, place, ctx.spend)

    def forward(self, x_RTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, Holding]:
        plan, rows = state.plan, state.rows_R
        qkv = self.project(x_RTD).unflatten(-1, (-1, self.head_width))
        if plan.cos is not None and plan.sin is not None:
            qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
            qkv = torch.cat((turn(qk, plan.cos, plan.sin), v), 2)
        q, kv = qkv.split((self.heads, 2 * self.kv_heads), dim=2)
        if rows is not None:
            kv = state.kv_BTGK.index_copy(0, rows, kv)
        elif state.kv_BTGK is not None:
            kv = torch.where(state.running_BT[..., None, None], kv, state.kv_BTGK)
        past = state.with_new(kv)
        k, v = (past.kv_BSGK if rows is None else past.kv_BSGK.index_select(0, rows)).chunk(2, dim=2)
        y_RTD = self.out(attend(q, k, v, plan.mask, causal=plan.mask is None))
        return y_RTD, replace(state, past=past, kv_BTGK=kv)

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        kv = torch.zeros((batch, capacity, 2 * self.kv_heads, self.head_width), device=device, dtype=dtype)
        return FixedShown(kv, torch.zeros(batch, device=device, dtype=torch.int64))
