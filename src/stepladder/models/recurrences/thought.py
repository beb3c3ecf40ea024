"""The thought stream: after every chunk of a document a few thought tokens tick over its past; later tokens read them.

Shape suffixes beside those of models.base: E events (thoughts made) in this call, Z thought tokens of an event,
R = 1 + E thoughts at hand (the carried one, then the new ones), M tokens that may read one of them.

Everything is counted from positions in the document, so packing, padding and chunks need no case of their own. With
``chunk`` C, an event happens at a token of position p where (p + 1) % C == 0. Two events are at least C tokens
apart, so T tokens have at most ceil(T / C), and floor(T / C) at the start of a sequence: static shapes. A token
reads the latest event at or before itself in its document, (p + 1) % C tokens back; if p + 1 < C there is none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.channels.swiglu import SwiGLU
from stepladder.models.halting import Halting, Progress
from stepladder.models.layers import linear, norm, residual_gain, rotate
from stepladder.models.mixers.attention import Cache, FixedCache, attend, empty_cache, extend, visible
from stepladder.models.mixers.cross import Cross
from stepladder.models.noise import Dropout


@dataclass(frozen=True)
class Thoughts:
    """What is carried along a sequence.

    past: keys and values of the hidden states that thoughts attend to. k, v: (B, Z, G, K), the row's latest thought
    as tokens read it, zeros if there was none; ticks, expected: (B,), the ticks it took, and its expected number of
    them, differentiable.
    """

    past: Cache | FixedCache
    k_BZGK: Tensor
    v_BZGK: Tensor
    ticks_B: Tensor
    expected_B: Tensor


class Tick(nn.Module):
    """One tick of a thought: u = norm(z) + W e;  u <- u + attention(norm u, past);  z' = u + SwiGLU(norm u).

    e is the hidden state of the event's own token, heard again at every tick (W only with ``inject``).
    """

    def __init__(self, width: int, cross: Cross, channel: SwiGLU, rope_base: float | None, dropout: float) -> None:
        super().__init__()
        self.norm, self.cross_norm, self.channel_norm = norm(width), norm(width), norm(width)
        self.cross, self.channel = cross, channel
        self.cross_dropout, self.channel_dropout = Dropout(dropout), Dropout(dropout)
        self.rope_base = rope_base

    def forward(
        self, z_BEZD: Tensor, again_BE1D: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Tensor, ctx: Context
    ) -> Tensor:
        """``ctx`` has the events' positions (B, E) in the place of the tokens'; mask: (B, 1, E x Z, S)."""
        thoughts = z_BEZD.shape[2]
        u_BEZD = self.norm(z_BEZD) + again_BE1D
        q = self.cross.queries(self.cross_norm(u_BEZD)).flatten(1, 2)
        q = turned(q, ctx.positions_BT.repeat_interleave(thoughts, dim=1), self.rope_base)
        y_BEZD = self.cross.out(attend(q, k_BSGK, v_BSGK, mask)).unflatten(1, (-1, thoughts))
        u_BEZD = u_BEZD + self._dropped(self.cross_dropout, y_BEZD, ctx)
        y_BEZD, _ = self.channel(self.channel_norm(u_BEZD), None, ctx)
        return u_BEZD + self._dropped(self.channel_dropout, y_BEZD, ctx)

    @staticmethod
    def _dropped(dropout: Dropout, y_BEZD: Tensor, ctx: Context) -> Tensor:
        """The Z tokens of an event are lanes of one place, so that each gets a mask of its own."""
        return dropout(y_BEZD.flatten(2), ctx).unflatten(2, y_BEZD.shape[2:])


class Thought(Part):
    """A stream of latent thoughts beside the tokens, made from chunks of the past and read mid-stack.

    An event's Z thought tokens start from a learned z_0 and tick (see Tick), all events of all rows in parallel;
    events do not hear each other, and see the tokens of their document up to their own. ``halting`` says how
    many ticks each event takes and mixes its states into the thought. Tokens read it by cross-attention, through
    a scalar gate that starts at 0: the architecture begins as the plain stack around it.

    Trace: "ticks" (B, T), those of the thought that a token reads, whether made in this call or an earlier one; a
    token without a thought reports the fewest that the policy allows. "ponder": the same of the expected number.
    "halt" (B, T, ticks): what the policy offered at each tick of the thought made *at* a token, held once it had
    halted; 0 where none was made. The term "ponder" is price x expected ticks of the thought that a token reads, so its
    mean over tokens is the price of the mean.

    Without gradients the loop ends when no event runs: what is left out weighs 0, so no bit of a result changes.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        hidden: int,
        *,
        thoughts: int,
        chunk: int,
        ticks: int,
        halting: Halting,
        inject: bool,
        rope_base: float | None,
        dropout: float,
        gain: float,
    ) -> None:
        super().__init__()
        self.chunk, self.ticks, self.kv_heads, self.rope_base = chunk, ticks, kv_heads, rope_base
        inner = residual_gain(ticks)
        cross, channel = Cross(width, heads, kv_heads, inner), SwiGLU(width, hidden, inner)
        self.initial_ZD = nn.Parameter(torch.randn(thoughts, width))
        self.past_norm = norm(width)
        self.inject = linear(width, width) if inject else None
        self.tick = Tick(width, cross, channel, rope_base, dropout)
        self.halting = halting
        self.thought_norm, self.reader_norm = norm(width), norm(width)
        self.read, self.read_dropout = Cross(width, heads, kv_heads, gain), Dropout(dropout)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        ticks = self.ticks if ctx.ticks is None else ctx.ticks
        if ticks < 1:
            raise UserError(f"ticks={ticks}: a thought takes at least one; give ticks >= 1")
        past_BTD, tokens = self.past_norm(x_BTD), x_BTD.shape[1]
        k, v = self.tick.cross.pairs(past_BTD)
        before, cache = extend(None if state is None else state.past, turned(k, ctx.positions_BT, self.rope_base), v)

        made_BT = (ctx.positions_BT + 1) % self.chunk == 0
        latest_BT = made_BT.cumsum(1)  # which of the R thoughts is the latest at a token
        number = torch.arange(1, self._events(tokens, state) + 1, device=x_BTD.device).expand(len(x_BTD), -1)
        real_BE = number <= latest_BT[:, -1:]
        # An unused slot thinks at the last token: it has something to see, and nobody reads it.
        index_BE = torch.searchsorted(latest_BT, number.contiguous()).clamp(max=tokens - 1)
        at = replace(ctx, positions_BT=ctx.positions_BT.gather(1, index_BE))
        mask = visible(before, index_BE, at.positions_BT, cache.k_BSGK.shape[1])
        own_BE1D = _rows(past_BTD, index_BE)[:, :, None]
        z_BEZD, progress, offers = self._think(own_BE1D, cache, mask, real_BE, at, ticks)

        old = self._none(len(x_BTD), x_BTD.device, k.dtype) if state is None else state
        k_BEZGK, v_BEZGK = self.read.pairs(self.thought_norm(z_BEZD))
        k_BRZGK, v_BRZGK = torch.cat((old.k_BZGK[:, None], k_BEZGK), 1), torch.cat((old.v_BZGK[:, None], v_BEZGK), 1)
        ticks_BR = torch.cat((old.ticks_B[:, None], progress.ticks), 1)
        expected_BR = torch.cat((old.expected_B[:, None], progress.expected), 1)

        some_BT = ctx.positions_BT + 1 >= self.chunk  # whether there is a thought to read
        first_BR = F.pad(index_BE, (1, 0))  # of the carried thought: the first token of the call
        y_BTD = self._read(self.reader_norm(x_BTD), k_BRZGK, v_BRZGK, first_BR, latest_BT)
        y_BTD = self.read.out(torch.where(some_BT[..., None], y_BTD, 0.0))
        x_BTD = x_BTD + self.read_dropout(self.gate * y_BTD, ctx)

        least = self.halting.least(ticks)
        expected_BT = torch.where(some_BT, expected_BR.gather(1, latest_BT), least)
        if self.halting.price:
            ctx.add_loss("ponder", self.halting.price * expected_BT)
        ctx.note("ticks", torch.where(some_BT, ticks_BR.gather(1, latest_BT), least))
        ctx.note("ponder", expected_BT)
        ctx.note("halt", _at_tokens(offers, latest_BT, made_BT, ticks))
        last_B1 = latest_BT[:, -1:]
        k_BZGK, v_BZGK, ticks_B, expected_B = (
            _rows(each, last_B1)[:, 0] for each in (k_BRZGK, v_BRZGK, ticks_BR, expected_BR)
        )
        return x_BTD, Thoughts(cache, k_BZGK, v_BZGK, ticks_B, expected_B)

    def _events(self, tokens: int, state: State) -> int:
        """Slots for the events of a call: as many as there can be."""
        return tokens // self.chunk if state is None else -(-tokens // self.chunk)

    def _think(
        self, own_BE1D: Tensor, past: Cache | FixedCache, mask: Tensor, real_BE: Tensor, at: Context, ticks: int
    ) -> tuple[Tensor, Progress, list[Tensor]]:
        """The thoughts (B, E, Z, D), their progress, and what halting offered at each executed tick."""
        again = own_BE1D.new_zeros(()) if self.inject is None else self.inject(own_BE1D)
        z = self.initial_ZD.repeat(*real_BE.shape, 1, 1)
        offers: list[Tensor] = []
        progress = self.halting.start(real_BE, z.dtype)
        mixed = torch.zeros_like(z, dtype=progress.left.dtype)
        mask = mask.repeat_interleave(z.shape[2], dim=2)
        grad = torch.is_grad_enabled()
        for tick in range(1, ticks + 1):
            if not (grad or torch.compiler.is_compiling() or bool(progress.running.any())):
                break
            args = (z, again, past.k_BSGK, past.v_BSGK, mask, at.at_tick(tick - 1))
            if at.recompute and grad:
                new = checkpoint(self.tick, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                new = self.tick(*args)
            # Hold needs no copy here: what a halted event goes on to compute weighs 0, and no other event sees it.
            weight, progress = self.halting(new.mean(2), z.mean(2), progress, tick, ticks)
            mixed = mixed + weight[..., None, None] * new
            z = new
            offers.append(progress.offer)
        return mixed.to(z.dtype), progress, offers

    def _read(self, x_BTD: Tensor, k_BRZGK: Tensor, v_BRZGK: Tensor, first_BR: Tensor, latest_BT: Tensor) -> Tensor:
        """What every token hears from its latest thought, (B, T, D); anything where it has none.

        Readers of one thought are neighbours, at most min(C, T) tokens from ``first_BR`` on. They are brought to
        the thought instead of the thought to each of them, which would copy it C times.
        """
        batch, tokens, width = x_BTD.shape
        readers = min(self.chunk, tokens)
        offset_M = torch.arange(readers, device=x_BTD.device)
        index_BRM = (first_BR[:, :, None] + offset_M).clamp(max=tokens - 1)
        q = _rows(self.read.queries(x_BTD), index_BRM.flatten(1)).unflatten(1, index_BRM.shape[1:])
        y = attend(q.flatten(0, 1), k_BRZGK.flatten(0, 1), v_BRZGK.flatten(0, 1), None)
        steps = torch.arange(tokens, device=x_BTD.device)
        offset_BT = (steps - first_BR.gather(1, latest_BT)).clamp(max=readers - 1)
        return _rows(y.view(batch, -1, width), latest_BT * readers + offset_BT)

    def _none(self, batch: int, device: torch.device, dtype: torch.dtype) -> Thoughts:
        """No past and no thought yet."""
        past = empty_cache(batch, 0, self.kv_heads, self.read.head_width, device, dtype)
        k, v = (past.k_BSGK.new_zeros(batch, len(self.initial_ZD), *past.k_BSGK.shape[2:]) for _ in range(2))
        expected = torch.zeros(batch, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return Thoughts(past, k, v, past.length_B, expected)

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        past = empty_cache(batch, capacity, self.kv_heads, self.read.head_width, device, dtype)
        return replace(self._none(batch, device, dtype), past=past)

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """Of a whole sequence; every event executes ``ticks``, as they do with gradients.

        Scores are counted as computed: every thought token against every key, every reader slot taken or not.
        """
        budget = self.ticks if ticks is None else ticks
        thoughts, width = self.initial_ZD.shape
        events = context // self.chunk
        per_tick = self.tick.cross.reader_flops() + 4 * context * width + self.tick.channel.cost(context).flops
        per_event = thoughts * (budget * per_tick + self.read.pair_flops())
        per_event += 0 if self.inject is None else 2 * self.inject.weight.numel()
        reading = (1 + events) * min(self.chunk, context) * 4 * thoughts * width
        per_token = self.tick.cross.pair_flops() + self.read.reader_flops()
        size = self.itemsize()
        pair = 2 * self.kv_heads * self.read.head_width * size
        state = (context + thoughts) * pair + torch.int64.itemsize + max(size, torch.float32.itemsize)
        return Cost(self.own_params(), per_token + (events * per_event + reading) / context, state)


def turned(x_BNHK: Tensor, positions_BN: Tensor, rope_base: float | None) -> Tensor:
    """Rotary positions on heads that stand behind their places; unchanged without a base."""
    return x_BNHK if rope_base is None else rotate(x_BNHK.transpose(1, 2), positions_BN, rope_base).transpose(1, 2)


def _rows(x: Tensor, index_BN: Tensor) -> Tensor:
    """x (B, T, ...) at the places ``index_BN`` of its second axis: (B, N, ...)."""
    return x.gather(1, index_BN.view(*index_BN.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def _at_tokens(offers: list[Tensor], latest_BT: Tensor, made_BT: Tensor, ticks: int) -> Tensor:
    """Offers of each tick (B, E) at the tokens where the events are, (B, T, ticks); the last one is held."""
    if not offers or offers[0].shape[1] == 0:
        return made_BT[..., None].expand(-1, -1, ticks) * 0.0
    held_BEK = torch.stack(offers + offers[-1:] * (ticks - len(offers)), dim=-1)
    found_BTK = _rows(held_BEK, (latest_BT - 1).clamp(min=0))
    return torch.where(made_BT[..., None], found_BTK, 0.0)
