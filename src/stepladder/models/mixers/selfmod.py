"""Self-modifying memories (Nested learning, eqs. 83-93): memories that make the keys, values, rates and targets of all.

Per head there are five memories M_k, M_v, M_eta, M_alpha and M, each x + W_2 silu(W_1 x). Of a token that a head hears
as u_t, with all memories as they were at the start of the token's chunk,

    k_t = M_k(u_t) at length 1    eta_t   = rate sigmoid(w . M_eta(u_t) + b)
    v_t = M_v(u_t)                alpha_t = sigmoid(w' . M_alpha(u_t) + b')
    e_t = m(k_t) - m(v_t) for every memory m
    y_t = M(q_t), q_t = W_q x_t at length 1

and each layer, with a_t what it hears and delta_t the gradient of |e_t|^2 / 2 behind it, goes

    W_2 <- alpha_t W_2 - eta_t delta_t a_t^T          W_1 <- alpha_t W_1 - eta_t (delta_t + W_1 k_t) k_t^T

token after token; the chunk ends with all of it done (delta gradient descent: what a key brings is also forgotten along
it). Chunks are counted from a document's first token, and what is read was written before the chunk began.

Suffixes: B batch, T tokens, D model width, H heads, K head width, W tokens of a window, M = 5 H memories.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.models.base import Context, Cost, Part, State
from stepladder.models.fast.chunks import Layout, Pick
from stepladder.models.fast.decay import ShortConvolution
from stepladder.models.fast.fast_weights import (
    Memory,
    Tokens,
    Weights,
    apply,
    decays,
    errors,
    recall,
    write,
)
from stepladder.models.fast.walk import Found, Rows, Walker
from stepladder.models.layers import linear, no_autocast, norm

RATE_BIAS, KEEP_BIAS = -2.0, 5.0
"""Initial biases of eta and alpha: small steps, and a memory that keeps 0.993 of itself a token."""

KINDS = 5
"""k, v, eta, alpha, and the memory that is read."""


@dataclass(frozen=True)
class Carried:
    """What a sequence carries: the last inputs of the convolution, and the memories in float32 or wider."""

    inputs_BLU: Tensor
    memory: Memory


class Memories(Walker):
    """The five memories of every head. bound: root mean square from which what is written is scaled down."""

    def __init__(
        self, heads: int, head_width: int, *, expand: int, rate: float, bound: float, horizon: int, chunk: int
    ) -> None:
        super().__init__()
        self.heads, self.rate, self.bound, self.horizon, self.chunk = heads, rate, bound, horizon, chunk
        hidden = expand * head_width
        self.first = nn.ParameterList(
            torch.randn(KINDS * heads, o, i) * scale / i**0.5
            for o, i, scale in ((hidden, head_width, 1.0), (head_width, hidden, 0.5))
        )
        self.told = nn.Parameter(torch.randn(2, heads, head_width) / head_width**0.5)
        self.bias = nn.Parameter(torch.tensor([RATE_BIAS, KEEP_BIAS]).repeat_interleave(heads))

    def learned(self, wide: torch.dtype) -> Memory:
        first = tuple(weight.to(wide) for weight in self.first)
        return Memory(first, first, ())

    def kinds(self, weights: Weights, first: int, last: int) -> Weights:
        """Of the memories some kinds."""
        return tuple(weight[..., first * self.heads : last * self.heads, :, :] for weight in weights)

    def tokens(self, base: Weights, u_BHWK: Tensor, q_BHWK: Tensor, real_BW: Tensor) -> Tokens:
        """What the memories at ``base`` make of tokens."""
        made = recall(self.kinds(base, 0, KINDS - 1), u_BHWK.repeat(1, KINDS - 1, 1, 1))
        k, v, eta, alpha = made.unflatten(1, (KINDS - 1, -1)).unbind(1)
        told, bias = self.told.to(u_BHWK.dtype), self.bias.to(u_BHWK.dtype).view(2, -1, 1)
        eta, alpha = (torch.einsum("bhwk,hk->bhw", each, told[i]) + bias[i] for i, each in enumerate((eta, alpha)))
        hidden = ~real_BW[:, None]
        rate, keep = (self.rate * eta.sigmoid()).masked_fill(hidden, 0.0), F.logsigmoid(alpha).masked_fill(hidden, 0.0)
        target = recall(base, v.repeat(1, KINDS, 1, 1))
        key = F.normalize(k, dim=-1).repeat(1, KINDS, 1, 1)
        return Tokens(q_BHWK, key, target, rate.repeat(1, KINDS, 1), keep.repeat(1, KINDS, 1), None, real_BW)

    def rows(self, base: Weights, tokens: Tokens) -> Rows:
        heard, (delta, error) = errors(base, tokens.k, tokens.v, self.bound)
        delta = delta + apply(base[0], tokens.k)
        delta = delta * (delta.square().mean(-1, keepdim=True) / self.bound**2).clamp(min=1.0).rsqrt()
        return heard, [delta, error]

    def step(self, memory: Memory, tokens: Tokens, rows: Rows) -> tuple[Tensor, Memory]:
        return recall(self.kinds(memory.base, KINDS - 1, KINDS), tokens.q), self.written(memory, tokens, rows)

    def fresh(self, learned: Memory, tokens: Tokens, rows: Rows, at: Layout) -> Tensor:
        return recall(self.kinds(learned.base, KINDS - 1, KINDS), tokens.q)

    def written(self, learned: Memory, tokens: Tokens, rows: Rows) -> Memory:
        within = decays(tokens, None, 1)
        return write(learned, *rows, within)


class SelfModifying(Part):
    """out( norm(y) * silu z ), u = silu(conv(W_u x)). Source and differences: zoo.hope."""

    site: int = 0

    def __init__(self, width: int, head_width: int, memories: Memories, conv: int, gain: float) -> None:
        super().__init__()
        inner = memories.heads * head_width
        self.memories, self.conv = memories, ShortConvolution(inner, conv)
        self.project, self.norm, self.out = linear(width, 3 * inner), norm(head_width), linear(inner, width, gain)

    def forward(self, x_BTD: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        u, q, gate = self.project(x_BTD).chunk(3, dim=-1)
        u, inputs_BLU = self.conv(u, None if state is None else state.inputs_BLU, ctx)
        wide = torch.promote_types(u.dtype, torch.float32)
        with no_autocast(x_BTD.device):  # a memory is kept in float32 whatever the other products are made in
            u, q = (each.to(wide).unflatten(-1, (self.memories.heads, -1)).transpose(1, 2) for each in (u, q))
            source = _Made(self.memories, u, F.normalize(q, dim=-1))
            given = None if state is None else state.memory
            (y_BHTK,), memory = self.memories.walk(source, given, ctx, wide, f"memory{self.site}.norm")
        y_BTD = self.norm(y_BHTK.transpose(1, 2).to(self.norm.weight.dtype)).flatten(2)
        return self.out(y_BTD * F.silu(gate)), Carried(inputs_BLU, memory)

    def init_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, ticks: int | None
    ) -> State:
        """The state does not grow, so ``capacity`` means nothing here."""
        return Carried(self.conv.start(batch, device, dtype), self.memories.start(batch, device, dtype))

    def cost(self, context: int, ticks: int | None = None) -> Cost:
        """One document in every row. A row of documents costs up to twice the memories' part (docs/nested.md)."""
        maps = self.project.weight.numel() + self.out.weight.numel() + self.memories.told.numel()
        weights = sum(weight.numel() for weight in self.memories.first)
        inner = self.out.weight.shape[1]
        carried = (len(self.conv.weight) - 1) * inner * self.itemsize() + 2 * weights * max(4, self.itemsize())
        return Cost(self.own_params(), 2 * maps + 2 * 5 * weights, carried)


@dataclass(frozen=True)
class _Made:
    """Tokens that the memories make themselves, at the start of every chunk."""

    memories: Memories
    u: Tensor
    q: Tensor

    def fresh(self, first: Weights, at: Layout) -> tuple[Tokens, Found]:
        return self.memories.tokens(first, self.u, self.q, torch.ones_like(at.start_BT, dtype=torch.bool)), ()

    def window(self, memory: Memory, pick: Pick, real_BW: Tensor, number: int) -> tuple[Tokens, Found]:
        return self.memories.tokens(memory.base, pick(self.u), pick(self.q), real_BW), ()
