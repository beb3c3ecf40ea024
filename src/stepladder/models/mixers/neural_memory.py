"""Neural memories in heads: their learned start, their gates, and how a call's tokens are read and written.

fast.fast_weights has the equations, fast.chunks how the chunks of all rows are computed together.

Suffixes: B batch, T tokens, H heads, K head width, W tokens of a window, U = 3HK, G gates of all heads.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.models.base import Context
from stepladder.models.fast.chunks import Layout, blocks, unblocked
from stepladder.models.fast.fast_weights import (
    Memory,
    Tokens,
    Weights,
    decays,
    errors,
    read,
    token_by_token,
    write,
)
from stepladder.models.fast.walk import Known, Rows, Walker
from stepladder.models.layers import linear

RATE_BIAS, FORGET_BIAS = -2.0, -5.0
"""Initial biases of theta and alpha: small steps, slow forgetting. That of eta is 0."""


class FastMemory(Walker):
    """Memories M, one a head. ``project`` makes queries, keys, values and what the gates are told.

    layers: of the memory network, 1 = a matrix, whose M_0 starts at 0. expand: its hidden width in head widths.
    rate: largest theta. momentum, forget: whether there are eta and alpha. bound: see fast_weights.errors. horizon:
    chunks of a document after which gradients stop, 0 = never.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        *,
        layers: int,
        expand: int,
        rate: float,
        momentum: bool,
        forget: bool,
        bound: float,
        horizon: int,
        scan: Literal["chunked", "naive"],
        chunk: int,
    ) -> None:
        super().__init__()
        self.heads, self.head_width, self.scan, self.chunk = heads, head_width, scan, chunk
        self.rate, self.momentum, self.forget, self.bound, self.horizon = rate, momentum, forget, bound, horizon
        self.sizes = (3 * heads * head_width, heads * (1 + momentum + forget))
        self.project = linear(width, sum(self.sizes))
        biases = [RATE_BIAS] + [0.0] * momentum + [FORGET_BIAS] * forget
        self.bias = nn.Parameter(torch.tensor(biases).repeat_interleave(heads))
        widths = [head_width, *[expand * head_width] * (layers - 1), head_width]
        self.first = nn.ParameterList(
            torch.randn(heads, o, i) * (0.0 if layers == 1 else i**-0.5) for i, o in pairwise(widths)
        )

    def told(self, qkv_BTU: Tensor, told_BTG: Tensor, real_BT: Tensor | None = None) -> Tokens:
        """Keys, queries, values and gates, in float32 or wider. Tokens that are not real write nothing."""
        wide = torch.promote_types(qkv_BTU.dtype, torch.float32)
        q, k, v = qkv_BTU.to(wide).unflatten(-1, (3, self.heads, self.head_width)).permute(2, 0, 3, 1, 4)
        gates = iter((told_BTG.to(wide) + self.bias.to(wide)).unflatten(-1, (-1, self.heads)).permute(2, 0, 3, 1))
        rate = self.rate * next(gates).sigmoid()
        glide = F.logsigmoid(next(gates)) if self.momentum else None
        keep = F.logsigmoid(-next(gates)) if self.forget else torch.zeros_like(rate)
        every = torch.ones(qkv_BTU.shape[:2], dtype=torch.bool, device=qkv_BTU.device)
        tokens = Tokens(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, rate, keep, glide, every)
        if real_BT is None:
            return tokens
        return tokens.map(lambda x: x.masked_fill(~real_BT.view(len(x), 1, -1, *(1,) * (x.dim() - 3)), 0.0), real_BT)

    def run(self, tokens: Tokens, memory: Memory | None, ctx: Context, name: str) -> tuple[Tensor, Memory]:
        """y (B, H, T, K) of all tokens, and the memory after them; ``name``: see ``walk``, which alone can trace."""
        batch, _, count, _ = tokens.q.shape
        if (self.scan == "naive" or count == 1) and not ctx.tracing:
            wide = tokens.q.dtype
            first = self.learned(wide).base
            begun = self.start(batch, tokens.q.device, wide) if memory is None else memory
            return token_by_token(first, begun, tokens, ctx.positions_BT, self.chunk, self.bound, self.horizon)
        (y_BHTK,), after = self.walk(Known(tokens), memory, ctx, tokens.q.dtype, name)
        return y_BHTK, after

    def learned(self, wide: torch.dtype) -> Memory:
        first = tuple(weight.to(wide) for weight in self.first)
        return Memory(first, first, tuple(torch.zeros_like(weight) for weight in first) if self.momentum else ())

    def rows(self, base: Weights, tokens: Tokens) -> Rows:
        return errors(base, tokens.k, tokens.v, self.bound)

    def step(self, memory: Memory, tokens: Tokens, rows: Rows) -> tuple[Tensor, Memory]:
        within = decays(tokens, None, tokens.q.shape[2], carried=self.momentum)
        return read(memory, tokens.q, *rows, within), write(memory, *rows, within)

    def fresh(self, learned: Memory, tokens: Tokens, rows: Rows, at: Layout) -> Tensor:
        """In blocks of at most a chunk of tokens, each with the block before it: a first chunk is no longer."""
        size = at.size

        def both(x: Tensor) -> Tensor:
            return blocks(x, 2, size, size)

        heard, deltas = ([both(each) for each in them] for them in rows)
        pairs = tokens.map(both, blocks(tokens.real.long(), 1, size, size).bool())
        document_BN = blocks(at.start_BT + 1, 1, size, size)  # 0 is the document of the padding
        y = read(replace(learned, momentum=()), pairs.q[:, :, size:], heard, deltas, decays(pairs, document_BN, size))
        return unblocked(y, tokens.q.shape[2])

    def written(self, learned: Memory, tokens: Tokens, rows: Rows) -> Memory:
        within = decays(tokens, None, 1)
        return write(replace(learned, momentum=()), *rows, within)

    def state_numbers(self) -> int:
        """Numbers of a carried memory."""
        return (3 if self.momentum else 2) * sum(weight.numel() for weight in self.first)

    def scan_flops(self, context: int) -> float:
        """Of the memory alone, for a whole document."""
        weights = sum(weight.numel() for weight in self.first)
        deep, copies = weights - self.first[0].numel(), 2 if self.momentum else 1
        edges = sum(sum(weight.shape[1:]) for weight in self.first)
        scan = 0
        for size, count in ((self.chunk, context // self.chunk), (context % self.chunk, 1)):
            if self.scan == "naive" or context == 1:
                scan += count * size * 2 * (2 * weights + deep)
            elif size:
                pairs = 2 * size * size * edges + (2 * size**3 + 2 * size * size if self.momentum else 0)
                scan += count * (2 * size * (weights + deep + 2 * copies * weights) + self.heads * pairs)
        return scan
