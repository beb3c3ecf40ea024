"""Continuum memory: a chain of MLPs that learn while they are used, each at its own pace (Nested learning, eqs. 70-74).

Level l has a period of C_l tokens, counted from a document's first token, and weights that are constant in between:

    z_0 = x;   z_l = z_{l-1} + W_b silu(W_a n(z_{l-1})),  n(z) = z / rms z;   output z_K - x

The teach signal is local: from what was heard one token ago, the chain predicts what is heard now,

    e_t = z_K(x_{t-1}) - T x_t        l_t = |e_t|^2 / 2        (T learned; none at a document's first token)

and its gradient goes through the whole chain, at the weights in force where the fastest period of t began. When a
period ends, with G the mean gradient over it and every layer's step divided by its inputs,

    sgd       W <- W - rate_l G
    momentum  M <- beta M - rate_l G;   W <- W + M
    dgd       W <- W - rate_l mean (delta_t + W a_t) a_t^T     (eqs. 27-29: what a layer hears it also forgets)

So tokens of a period see what ended before it, and no token hears a later one. Rates are learned through the writes.

Suffixes: B batch, T tokens, D width, F hidden width of a level, L levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.fast.chunks import Layout
from stepladder.models.fast.fast_weights import Memory, Tokens, Weights, apply
from stepladder.models.fast.walk import Known, Rows, Walker
from stepladder.models.layers import NORM_EPS, linear, no_autocast

Rule = Literal["sgd", "momentum", "dgd"]
"""What a level does with its gradient."""

BETA = 0.9
"""Momentum from one update of a level to its next."""


@dataclass(frozen=True)
class Carried:
    """The last input (B, 1, 1, D); of every level the weights in force, those they are on the way to, and momentum."""

    input_B11D: Tensor
    memory: Memory


class Levels(Walker):
    """The chain and its learning. ``chunk``: the fastest period; level l has ``factor`` ** l times as much.

    bound: root mean square from which e is scaled down, so that writes stay finite.
    """

    def __init__(
        self, width: int, hidden: int, levels: int, chunk: int, factor: int, rule: Rule, rate: float, bound: float,
        horizon: int, gain: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.chunk, self.factor, self.rule, self.bound, self.horizon = chunk, factor, rule, bound, horizon
        shapes = [(hidden, width, 1.0), (width, hidden, gain / math.sqrt(levels))] * levels
        self.first = nn.ParameterList(torch.randn(1, o, i) * scale / math.sqrt(i) for o, i, scale in shapes)
        self.rate_log = nn.Parameter(torch.full((levels,), math.log(rate)))

    def look(self, weights: Weights) -> Tensor:
        """How far every level is from its start: (L,) or (B, L)."""
        pairs = zip(weights, self.first, strict=True)
        squares = [(now - first).square().sum((-3, -2, -1)) for now, first in pairs]
        return torch.stack(torch.broadcast_tensors(*squares), dim=-1).unflatten(-1, (-1, 2)).sum(-1).sqrt()

    def learned(self, wide: torch.dtype) -> Memory:
        first = tuple(weight.to(wide) for weight in self.first)
        return Memory(first, first, tuple(map(torch.zeros_like, first)) if self.rule == "momentum" else ())

    def chain(self, weights: Weights, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """z_K; and of all layers what they hear, what they say, and the rms of every level's input."""
        heard, said, sizes = [], [], []
        for into, out in zip(weights[::2], weights[1::2], strict=True):
            sizes.append((x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt())
            heard.append(x / sizes[-1])
            said.append(apply(into, heard[-1]))
            heard.append(F.silu(said[-1]))
            said.append(apply(out, heard[-1]))
            x = x + said[-1]
        return x, heard, said, sizes

    def rows(self, base: Weights, tokens: Tokens) -> Rows:
        z, heard, said, sizes = self.chain(base, tokens.k)
        back = z - tokens.v
        back = back * (back.square().mean(-1, keepdim=True) / self.bound**2).clamp(min=1.0).rsqrt()
        deltas: list[Tensor] = []
        for level in reversed(range(len(base) // 2)):
            into, out = base[2 * level], base[2 * level + 1]
            sums = said[2 * level]
            gate = sums.sigmoid()
            inner = _transposed(out, back) * gate * (1 + sums * (1 - gate))
            deltas[:0] = [inner, back]
            if level:
                n, g = heard[2 * level], _transposed(into, inner)
                back = back + (g - n * (g * n).mean(-1, keepdim=True)) / sizes[level]
        if self.rule == "dgd":
            deltas = [delta + own for delta, own in zip(deltas, said, strict=True)]
        rates = self.rate_log.to(z.dtype).exp()
        steps = [rates[i // 2] / (self.period(i // 2) * a.shape[-1]) for i, a in enumerate(heard)]
        return heard, [step * tokens.rate[..., None] * delta for step, delta in zip(steps, deltas, strict=True)]

    def period(self, level: int) -> int:
        """Tokens between two updates."""
        return self.chunk * self.factor**level

    def step(self, memory: Memory, tokens: Tokens, rows: Rows) -> tuple[Tensor, Memory]:
        return self.chain(memory.base, tokens.q)[0] - tokens.q, self.written(memory, tokens, rows)

    def fresh(self, learned: Memory, tokens: Tokens, rows: Rows, at: Layout) -> Tensor:
        return self.chain(learned.base, tokens.q)[0] - tokens.q

    def written(self, learned: Memory, tokens: Tokens, rows: Rows) -> Memory:
        now = tuple(w - delta.mT @ a for w, a, delta in zip(learned.now, *rows, strict=True))
        return Memory(learned.base, now, learned.momentum)

    def commit(self, memory: Memory, done: int | Tensor) -> Memory:
        """Levels whose period ends go where they were on the way to; the others stay as they are."""
        base, now, momentum = [], [], []
        for place, (old, new) in enumerate(zip(memory.base, memory.now, strict=True)):
            moved = new
            if self.rule == "momentum":
                glide = BETA * memory.momentum[place] + (new - old)
                moved = old + glide
                momentum.append(_due(done, self.factor ** (place // 2), glide, memory.momentum[place]))
            base.append(_due(done, self.factor ** (place // 2), moved, old))
            now.append(_due(done, self.factor ** (place // 2), moved, new))
        return self.stopped(Memory(tuple(base), tuple(now), tuple(momentum)), done)


class ContinuumMemory(Part):
    """A channel mixer of ``levels``. With ``learn`` off its weights stay: a chain of MLPs, the control.

    Source and differences: zoo.hope. Every row carries weights of its own: 2 x those of the chain.
    """

    site: int = 0

    def __init__(self, width: int, levels: Levels, learn: bool) -> None:
        super().__init__()
        self.levels = levels
        self.teach = linear(width, width) if learn else None
        if not learn:
            del levels.rate_log

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        with no_autocast(x_BTD.device):
            x = x_BTD.to(wide)[:, None]
            if self.teach is None:
                first = tuple(weight.to(wide) for weight in self.levels.first)
                return (self.levels.chain(first, x)[0] - x)[:, 0].to(x_BTD.dtype), None
            last = torch.zeros_like(x[:, :, :1]) if state is None else state.input_B11D.to(wide)
            begins = (ctx.positions_BT == 0)[:, None]
            key = torch.cat((last, x[:, :, :-1]), dim=2).masked_fill(begins[..., None], 0.0)
            rate = torch.ones_like(x[..., 0]).masked_fill(begins, 0.0)
            target = F.linear(x, self.teach.weight.to(wide))
            real = torch.ones_like(begins[:, 0])
            tokens = Tokens(x, key, target, rate, torch.zeros_like(rate), None, real)
            given = None if state is None else state.memory
            (y,), memory = self.levels.walk(Known(tokens), given, ctx, wide, f"cms{self.site}.moved")
        return y[:, 0].to(x_BTD.dtype), Carried(x[:, :, -1:], memory)

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        """The state does not grow, so ``capacity`` means nothing here."""
        if self.teach is None:
            return None
        wide = torch.promote_types(dtype, torch.float32)
        last = torch.zeros(batch, 1, 1, self.teach.weight.shape[0], device=device, dtype=wide)
        return Carried(last, self.levels.start(batch, device, dtype))

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """One document in every row. A row of documents costs up to twice as much (docs/nested.md)."""
        weights = sum(weight.numel() for weight in self.levels.first)
        if self.teach is None:
            return Cost(self.own_params(), 2 * weights)
        back = weights - self.levels.first[0].numel()
        copies = 3 if self.levels.rule == "momentum" else 2
        held = copies * weights + self.teach.weight.shape[0]
        flops = 2 * (3 * weights + back + self.teach.weight.numel())
        return Cost(self.own_params(), flops, held * max(4, self.itemsize()))


def _transposed(weight: Tensor, delta: Tensor) -> Tensor:
    """W^T delta; a matrix that rows share is not copied for each of them."""
    return torch.einsum("bhno,hoi->bhni" if weight.dim() == 3 else "bhno,bhoi->bhni", delta, weight)


def _due(done: int | Tensor, every: int, yes: Tensor, no: Tensor) -> Tensor:
    if isinstance(done, Tensor):
        return torch.where((done % every == 0)[:, None, None, None], yes, no)
    return yes if done % every == 0 else no
