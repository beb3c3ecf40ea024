"""The experts of a planner: one distribution over the vocabulary for each of K plans, given a hidden state.

An expert is evaluated on its own, over as many tokens as make ``BLOCK`` logits, and for the likelihood it leaves K
normalisers and a few logits a token: neither tokens x K x V nor tokens x V numbers exist at any time in training.

Suffixes as in models.base, and: K plans, J ids that are looked up, F width in front of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepladder.models.kernels import experts as kernel
from stepladder.models.layers import linear

BLOCK = 2**21
"""At most this many logits of one expert exist at a time in the likelihood: 8 MiB in float32."""


class Experts(nn.Module):
    """Base of the two forms. ``flops``: of all K distributions of a token."""

    def __init__(self, plans: int, vocab: int) -> None:
        super().__init__()
        self.plans, self.vocab = plans, vocab
        self.flops = 0

    def features(self, h_ND: Tensor) -> Tensor:
        """(N, F): what all experts share."""
        return h_ND

    def each(self) -> list[Expert]:
        """All experts. Weights are taken apart once: slices would each give a gradient of the whole."""
        raise NotImplementedError

    def at(self, h_ND: Tensor, ids_N: Tensor) -> Tensor:
        """Logits (N, K) of one id a token, without those of others."""
        raise NotImplementedError

    def logits(self, h_ND: Tensor) -> list[Tensor]:
        """Logits (N, V) of every expert, float32 or wider."""
        features_NF = self.features(h_ND)
        return [_logits(expert.hears(features_NF), expert.weight_VF, expert.bias_V) for expert in self.each()]

    def score(self, h_ND: Tensor, ids_NJ: Tensor) -> tuple[Tensor, Tensor]:
        """Normalisers (N, K), the log of the sum of exp logits, and the logits (N, J, K) of some ids."""
        features_NF = self.features(h_ND)
        if not torch.compiler.is_compiling():
            return kernel.score(*_typed(ids_NJ, *self.stacked(features_NF)), BLOCK)
        # A compiler fuses the plain way by itself.
        return plain(features_NF, ids_NJ, self.each(), max(1, BLOCK // self.vocab))

    def stacked(self, features_NF: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What all experts hear (K, N, F), weights (K, V, F) and biases (K, V); K is 1 where they share them."""
        raise NotImplementedError

    def expected(self, h_NMD: Tensor, lse_NMK: Tensor, ids_NJ: Tensor, meant_NM: Tensor) -> Tensor:
        """Log of the mean, over the meant ones of M tokens, of the probability of J ids: (N, J, K).

        Finite where nothing is meant. Rows of weights, J for each N, are looked up for one expert after the other, and
        again in the backward pass.
        """
        experts = self.each()
        features_NMF = self.features(h_NMD.to(experts[0].weight_VF.dtype))
        found = [
            checkpoint(
                _mean, features_NMF, lse_NM, ids_NJ, meant_NM, expert, use_reentrant=False, preserve_rng_state=False
            )
            for lse_NM, expert in zip(lse_NMK.unbind(-1), experts, strict=True)
        ]
        return torch.stack(found, -1)


@dataclass(frozen=True)
class Expert:
    """Logits W z + b, where z is what all experts share, or tanh of that and of the plan's vector."""

    weight_VF: Tensor
    bias_V: Tensor | None = None
    plan_F: Tensor | None = None

    def hears(self, features_NF: Tensor) -> Tensor:
        """z, (N, F)."""
        return features_NF if self.plan_F is None else torch.tanh(features_NF + self.plan_F)


def _mean(features_NMF: Tensor, lse_NM: Tensor, ids_NJ: Tensor, meant_NM: Tensor, expert: Expert) -> Tensor:
    """See Experts.expected, of one expert."""
    weight_NJF = _wide(F.embedding(ids_NJ, expert.weight_VF))
    said_NMJ = _wide(expert.hears(features_NMF)) @ weight_NJF.transpose(1, 2) - lse_NM[..., None]
    if expert.bias_V is not None:
        said_NMJ = said_NMJ + _wide(expert.bias_V)[ids_NJ][:, None]
    count_N1 = meant_NM.sum(1, keepdim=True)
    other_NM = ~meant_NM & (count_N1 > 0)  # a sum of nothing would have no slope
    return said_NMJ.masked_fill(other_NM[..., None], -torch.inf).logsumexp(1) - count_N1.clamp(min=1).log()


def plain(features_NF: Tensor, ids_NJ: Tensor, experts: list[Expert], rows: int) -> tuple[Tensor, Tensor]:
    """What kernels.experts.score computes, by autograd: of every block, logits are made again in the backward pass."""
    found = []
    for expert in experts:
        parts = zip(expert.hears(features_NF).split(rows), ids_NJ.split(rows), strict=True)
        # The expert is an argument, not a captured loop variable: recomputation must meet the same weights.
        weights = expert.weight_VF, expert.bias_V
        blocks = [
            checkpoint(_block, z, ids, *weights, use_reentrant=False, preserve_rng_state=False) for z, ids in parts
        ]
        found.append([torch.cat(each) for each in zip(*blocks, strict=True)])
    lse_NK, picked_NJK = (torch.stack(each, -1) for each in zip(*found, strict=True))
    return lse_NK, picked_NJK


def _block(z_NF: Tensor, ids_NJ: Tensor, weight_VF: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor]:
    logits_NV = _logits(z_NF, weight_VF, bias_V)
    return logits_NV.logsumexp(-1), logits_NV.gather(1, ids_NJ)


def _logits(z_NF: Tensor, weight_VF: Tensor, bias_V: Tensor | None) -> Tensor:
    return _wide(F.linear(z_NF, weight_VF, bias_V))


def _typed(
    ids_NJ: Tensor, z_KNF: Tensor, weight_KVF: Tensor, bias_KV: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """In the type in which autocast makes products: a product that is written out must be told."""
    kind = z_KNF.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or z_KNF.dtype == torch.float64:
        return z_KNF, ids_NJ, weight_KVF, bias_KV
    to = torch.get_autocast_dtype(kind)
    return z_KNF.to(to), ids_NJ, weight_KVF.to(to), None if bias_KV is None else bias_KV.to(to)


class OwnHeads(Experts):
    """Every plan has a linear head of its own (APEL-R, version 2): logits_k = W_k h. K heads cost K heads."""

    def __init__(self, width: int, vocab: int, plans: int) -> None:
        super().__init__(plans, vocab)
        self.heads = linear(width, plans * vocab, gain=0.25)
        self.flops = 2 * self.heads.weight.numel()

    def each(self) -> list[Expert]:
        return [Expert(weight_VD) for weight_VD in self.heads.weight.unflatten(0, (self.plans, self.vocab)).unbind(0)]

    def stacked(self, features_NF: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return features_NF[None], self.heads.weight.unflatten(0, (self.plans, self.vocab)), None

    def at(self, h_ND: Tensor, ids_N: Tensor) -> Tensor:
        each_KND = self.heads.weight.unflatten(0, (self.plans, self.vocab))[:, ids_N]
        return _wide(each_KND * h_ND).sum(-1).t()


class SharedHead(Experts):
    """One head, told the plan (APEL-R, version 1): logits_k = W_o tanh(W_s h + b + p_k) + v_k.

    Differs from it in: the plan's vector p_k is learned as such (there W_p u_k, one vector with two sets of
    parameters); no dropout of its own.
    """

    def __init__(self, width: int, inner: int, vocab: int, plans: int) -> None:
        super().__init__(plans, vocab)
        self.state, self.out = linear(width, inner), linear(inner, vocab, gain=0.25)
        # Vectors: the optimizer does not decay them.
        self.bias = nn.Parameter(torch.zeros(inner))
        self.plan = nn.Parameter(torch.randn(plans * inner) * 0.1)
        self.words = nn.Parameter(torch.zeros(plans * vocab))
        self.flops = 2 * (self.state.weight.numel() + plans * self.out.weight.numel())

    def features(self, h_ND: Tensor) -> Tensor:
        return F.linear(h_ND, self.state.weight, self.bias)

    def each(self) -> list[Expert]:
        parts = (each.unflatten(0, (self.plans, -1)).unbind(0) for each in (self.words, self.plan))
        return [Expert(self.out.weight, words_V, plan_F) for words_V, plan_F in zip(*parts, strict=True)]

    def stacked(self, features_NF: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        words_KV, plan_KF = (each.unflatten(0, (self.plans, -1)) for each in (self.words, self.plan))
        return torch.tanh(features_NF + plan_KF[:, None]), self.out.weight[None], words_KV

    def at(self, h_ND: Tensor, ids_N: Tensor) -> Tensor:
        fused_NKF = torch.tanh(self.features(h_ND)[:, None] + self.plan.unflatten(0, (self.plans, -1)))
        own_NK = _wide(fused_NKF * self.out.weight[ids_N][:, None]).sum(-1)
        return own_NK + self.words.unflatten(0, (self.plans, -1))[:, ids_N].t()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
