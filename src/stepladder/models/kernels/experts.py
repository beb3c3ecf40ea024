"""Normalisers and some logits of one expert, with the backward pass written out.

The plain way (heads.experts) recomputes logits under autograd, which makes and adds several arrays of their size. Here
one array of a block's logits becomes, in place, the gradient of these logits.

Suffixes as in heads.experts: N tokens, F features, V vocabulary, J ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_NF: Tensor, ids_NJ: Tensor, weight_VF: Tensor, bias_V: Tensor | None, rows: int) -> Any:
        found = []
        for z, ids in zip(z_NF.split(rows), ids_NJ.split(rows), strict=True):
            logits_NV = _logits(z, weight_VF, bias_V)
            picked_NJ, top_N1 = logits_NV.gather(1, ids), logits_NV.amax(1, keepdim=True)
            lse_N = logits_NV.sub_(top_N1).exp_().sum(1).log_().add_(top_N1[:, 0])
            found.append((lse_N, picked_NJ))
        lse_N, picked_NJ = (torch.cat(each) for each in zip(*found, strict=True))
        ctx.rows, ctx.bias = rows, bias_V is not None
        ctx.save_for_backward(z_NF, ids_NJ, weight_VF, lse_N, *([bias_V] if bias_V is not None else []))
        return lse_N, picked_NJ

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        z_NF, ids_NJ, weight_VF, lse_N, *rest = ctx.saved_tensors
        bias_V = rest[0] if ctx.bias else None
        dz_NF, dweight_VF = torch.empty_like(z_NF), torch.zeros_like(weight_VF)
        dbias_V = None if bias_V is None else torch.zeros_like(bias_V)
        parts = (each.split(ctx.rows) for each in (z_NF, ids_NJ, lse_N, *slopes, dz_NF))
        for z, ids, lse, dlse, dpicked, dz in zip(*parts, strict=True):
            d_NV = _logits(z, weight_VF, bias_V).sub_(lse[:, None]).exp_().mul_(dlse[:, None])
            d_NV.scatter_add_(1, ids, dpicked)
            if dbias_V is not None:
                dbias_V += d_NV.sum(0)
            d_NV = d_NV.to(z.dtype)
            torch.mm(d_NV, weight_VF, out=dz)
            dweight_VF.addmm_(d_NV.t(), z)
        return dz_NF, None, dweight_VF, dbias_V, None


def _logits(z_NF: Tensor, weight_VF: Tensor, bias_V: Tensor | None) -> Tensor:
    logits = z_NF @ weight_VF.t() if bias_V is None else torch.addmm(bias_V, z_NF, weight_VF.t())
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def score(z_NF: Tensor, ids_NJ: Tensor, weight_VF: Tensor, bias_V: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """Normalisers (N,) and logits (N, J) of ``ids``, ``rows`` tokens at a time. z, weight and bias of one type."""
    lse_N, picked_NJ = _Score.apply(z_NF, ids_NJ, weight_VF, bias_V, rows)
    return lse_N, picked_NJ
