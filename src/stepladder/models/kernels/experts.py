"""Normalisers and some logits of all experts, with the backward pass written out.

The plain way (heads.experts) recomputes logits under autograd, which makes and adds several arrays of their size. Here
one array of some tokens' logits of some words becomes, in place, the gradient of these logits. On a CPU that array is
small enough to stay in the cache between the product that makes it and the two that use it.

Four products are the least there is without keeping tokens x K x V numbers: a normaliser's slope is known only when
all tokens' normalisers are, so logits are made twice.

Suffixes as in heads.experts: K experts (or 1, if they share the array), N tokens, F features, V vocabulary, J ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

WORDS = 2048
"""Words at a time on a CPU."""

TILE = 2**19
"""Logits at a time on a CPU: 2 MiB in float32."""


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_KNF: Tensor, ids_NJ: Tensor, weight_KVF: Tensor, bias_KV: Tensor | None, size: int) -> Any:
        given = z_KNF, weight_KVF, bias_KV
        tiles, plans, tokens = list(_tiles(z_KNF, weight_KVF, size)), _plans(*given), z_KNF.shape[1]
        wide = torch.promote_types(z_KNF.dtype, torch.float32)
        places = len({words.start for words, _ in tiles})
        top_PN, sum_PN = (z_KNF.new_empty(places, tokens, dtype=wide) for _ in range(2))
        lse_NK = z_KNF.new_empty(tokens, plans, dtype=wide)
        picked_NJK = z_KNF.new_zeros(*ids_NJ.shape, plans, dtype=wide)
        for plan in range(plans):
            for place, (words, some) in zip(_places(tiles), tiles, strict=True):
                logits_NV = _logits(given, plan, some, words)
                index, inside = _inside(ids_NJ[some], words)
                picked_NJK[some, :, plan] += torch.where(inside, logits_NV.gather(1, index), 0.0)
                top_N1 = logits_NV.amax(1, keepdim=True)
                top_PN[place, some] = top_N1[:, 0]
                sum_PN[place, some] = logits_NV.sub_(top_N1).exp_().sum(1)
            lse_NK[:, plan] = (top_PN + sum_PN.log_()).logsumexp(0)
        ctx.size, ctx.bias = size, bias_KV is not None
        ctx.save_for_backward(z_KNF, ids_NJ, weight_KVF, lse_NK, *([bias_KV] if bias_KV is not None else []))
        return lse_NK, picked_NJK

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        (dlse_NK, dpicked_NJK), (z_KNF, ids_NJ, weight_KVF, lse_NK, *rest) = slopes, ctx.saved_tensors
        given = z_KNF, weight_KVF, rest[0] if ctx.bias else None
        # What is not told to begin afresh adds up: all words to dz, all tokens to dweight, experts to what they share.
        dz_KNF, dweight_KVF = torch.empty_like(z_KNF), torch.empty_like(weight_KVF)
        dbias_KV = torch.zeros_like(rest[0]) if ctx.bias else None
        for plan in range(_plans(*given)):
            of_z, of_weight = min(plan, len(z_KNF) - 1), min(plan, len(weight_KVF) - 1)
            for words, some in _tiles(z_KNF, weight_KVF, ctx.size):
                d_NV = _logits(given, plan, some, words).sub_(lse_NK[some, plan, None]).exp_()
                d_NV.mul_(dlse_NK[some, plan, None])
                index, inside = _inside(ids_NJ[some], words)
                d_NV.scatter_add_(1, index, torch.where(inside, dpicked_NJK[some, :, plan], 0.0))
                if dbias_KV is not None:
                    dbias_KV[plan, words] += d_NV.sum(0)
                d_NV = d_NV.to(z_KNF.dtype)
                afresh = words.start == 0 and of_z == plan
                dz_KNF[of_z, some].addmm_(d_NV, weight_KVF[of_weight, words], beta=0 if afresh else 1)
                afresh = some.start == 0 and of_weight == plan
                dweight_KVF[of_weight, words].addmm_(d_NV.t(), z_KNF[of_z, some], beta=0 if afresh else 1)
        return dz_KNF, None, dweight_KVF, dbias_KV, None


def _plans(z_KNF: Tensor, weight_KVF: Tensor, bias_KV: Tensor | None) -> int:
    return max(len(z_KNF), len(weight_KVF), 1 if bias_KV is None else len(bias_KV))


def _tiles(z_KNF: Tensor, weight_KVF: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Words, and tokens: the tokens go round faster, so that weights and their gradient are met in the cache."""
    tokens, vocab = z_KNF.shape[1], weight_KVF.shape[1]
    # In low precision, sums over words are left to the product, which is wider inside.
    cut = z_KNF.device.type == "cpu" and z_KNF.dtype in (torch.float32, torch.float64)
    words = min(vocab, WORDS) if cut else vocab
    some = max(1, min(size, TILE if cut else size) // words)
    for first in range(0, vocab, words):
        for begin in range(0, tokens, some):
            yield slice(first, min(first + words, vocab)), slice(begin, min(begin + some, tokens))


def _places(tiles: list[tuple[slice, slice]]) -> list[int]:
    """The number of each tile's words."""
    order = list(dict.fromkeys(words.start for words, _ in tiles))
    return [order.index(words.start) for words, _ in tiles]


def _inside(ids_NJ: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Where ids stand among ``words``, and whether they do."""
    index_NJ, count = ids_NJ - words.start, words.stop - words.start
    return index_NJ.clamp(0, count - 1), (index_NJ >= 0) & (index_NJ < count)


def _logits(given: tuple[Tensor, Tensor, Tensor | None], plan: int, some: slice, words: slice) -> Tensor:
    z_KNF, weight_KVF, bias_KV = given
    z_NF = z_KNF[min(plan, len(z_KNF) - 1), some]
    weight_VF = weight_KVF[min(plan, len(weight_KVF) - 1), words]
    logits = z_NF @ weight_VF.t() if bias_KV is None else torch.addmm(bias_KV[plan, words], z_NF, weight_VF.t())
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def score(
    z_KNF: Tensor, ids_NJ: Tensor, weight_KVF: Tensor, bias_KV: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """Normalisers (N, K) and logits (N, J, K) of ``ids``, at most ``size`` logits at a time. All of one type."""
    lse_NK, picked_NJK = _Score.apply(z_KNF, ids_NJ, weight_KVF, bias_KV, size)
    return lse_NK, picked_NJK
