"""A memory that is a small network, written by gradient descent while it is read (Titans; Behrouz et al., 2025).

M is a matrix (one layer), or x + W_L silu( ... silu(W_1 x)) (L layers; "Nested learning", 2025, eq. 91). Token t asks
it to answer k_t with v_t; the error is l(M) = |M(k_t) - v_t|^2 / 2, summed over features. With gates eta (momentum),
theta (rate) and alpha (forgetting), all of token t,

    S_t = eta_t S_{t-1} - theta_t grad l_t(M_c)      M_t = (1 - alpha_t) M_{t-1} + S_t      y_t = M_t(q_t)

Gradients are taken at M_c, the memory at the start of the token's chunk (the paper's section 3.2): with chunks of one
token that is M_{t-1}. A document's chunks are counted from its first token, so they are part of the function and a
call may be cut anywhere. Within a chunk the gradient of a layer is a sum of products delta_t a_t^T of rows, a_t what
the layer hears, so that the writes need no weights per token (spec "nested", 1.3): with D the products of decays,

    x W_t^T = A_t x W^T + B_t x S^T - sum_{j <= t} P[t, j] (x . a_j) delta_j      A_t = prod (1 - alpha)
    P = D_alpha D_eta diag(theta)                                                 B = D_alpha (prod eta)

Suffixes: B batch, H heads, N tokens of a window, K head width, O and I outputs and inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stepladder.models.fast.decay import decay, running_sum

Weights = tuple[Tensor, ...]
"""One matrix a layer, (B, H, O, I); or (H, O, I) where all rows share it."""


@dataclass(frozen=True)
class Memory:
    """base: the weights at the chunk's start. now: the weights. momentum: S, no tensors without momentum."""

    base: Weights
    now: Weights
    momentum: Weights

    def map(self, function: Callable[[Tensor], Tensor]) -> Memory:
        """A memory made from this one by a function of its tensors."""
        return Memory(*(tuple(map(function, weights)) for weights in (self.base, self.now, self.momentum)))


@dataclass(frozen=True)
class Tokens:
    """What tokens ask of a memory. q, k, v (B, H, N, K); rate theta, keep log(1 - alpha), glide log eta (B, H, N).

    real (B, N): the tokens that count. ``glide`` None: no momentum.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    keep: Tensor
    glide: Tensor | None
    real: Tensor

    def map(self, function: Callable[[Tensor], Tensor], real: Tensor) -> Tokens:
        """Other tokens, made from these by a function of (B, H, N, ...) tensors."""
        glide = None if self.glide is None else function(self.glide)
        q, k, v, rate, keep = (function(each) for each in (self.q, self.k, self.v, self.rate, self.keep))
        return Tokens(q, k, v, rate, keep, glide, real)


@dataclass(frozen=True)
class Decays:
    """reads: A and B (B, H, N) and P (B, H, N', N) of some tokens; ends: those of S after the last one."""

    a: Tensor
    b: Tensor | None
    p: Tensor
    s: Tensor | None
    e: Tensor | None


def apply(weight: Tensor, x_BHNI: Tensor) -> Tensor:
    """W x; a matrix that rows share is not copied for each of them."""
    return torch.einsum("bhni,hoi->bhno" if weight.dim() == 3 else "bhni,bhoi->bhno", x_BHNI, weight)


def recall(weights: Weights, q_BHNK: Tensor) -> Tensor:
    """M(q), without a write."""
    x = q_BHNK
    for layer, weight in enumerate(weights):
        x = apply(weight, F.silu(x) if layer else x)
    return x if len(weights) == 1 else q_BHNK + x


def errors(weights: Weights, k_BHNK: Tensor, v_BHNK: Tensor, bound: float) -> tuple[list[Tensor], list[Tensor]]:
    """Of every layer: what it hears, a, and delta, so that delta a^T is the gradient of l.

    M(k) - v is scaled down where its root mean square is above ``bound``: writes stay finite whatever was written.
    """
    heard, sums, x = [], [], k_BHNK
    for layer, weight in enumerate(weights):
        heard.append(F.silu(x) if layer else x)
        x = apply(weight, heard[-1])
        sums.append(x)
    wrong = (x if len(weights) == 1 else k_BHNK + x) - v_BHNK
    wrong = wrong * (wrong.square().mean(-1, keepdim=True) / bound**2).clamp(min=1.0).rsqrt()
    deltas = [wrong]
    for weight, z in zip(reversed(weights[1:]), reversed(sums[:-1]), strict=True):
        gate = z.sigmoid()
        back = torch.einsum("bhno,hoi->bhni" if weight.dim() == 3 else "bhno,bhoi->bhni", deltas[0], weight)
        deltas.insert(0, back * gate * (1 + z * (1 - gate)))
    return heard, deltas


def decays(tokens: Tokens, document_BN: Tensor | None, last: int, carried: bool = False) -> Decays:
    """The decays within a window of tokens, begun afresh at every document, for its ``last`` tokens as readers.

    document_BN None: all tokens that count are of one document. carried: whether an S comes into the window.
    """

    def since_start(x_BHN: Tensor) -> Tensor:
        if document_BN is None:
            return x_BHN.cumsum(-1)
        return running_sum(x_BHN.transpose(1, 2), document_BN).transpose(1, 2)

    if document_BN is None:
        count = tokens.keep.shape[-1]
        pairs = torch.ones(1, 1, count, count, dtype=torch.bool, device=tokens.keep.device).tril()
    else:
        pairs = (document_BN[:, :, None] == document_BN[:, None]).tril()[:, None]
    some = slice(-last, None)
    keep_BHN = since_start(tokens.keep)
    alpha = decay(keep_BHN[..., some, None] - keep_BHN[..., None, :], pairs[..., some, :])
    alpha = alpha * tokens.real[:, None, None]  # a token that does not count adds no S to M
    rate = tokens.rate[..., None, :]
    if tokens.glide is None:
        return Decays(keep_BHN[..., some].exp(), None, alpha * rate, None, None)
    glide_BHN = since_start(tokens.glide)
    eta = decay(glide_BHN[..., :, None] - glide_BHN[..., None, :], pairs)
    a, p, s = keep_BHN[..., some].exp(), (alpha @ eta) * rate, eta[..., -1, :] * tokens.rate
    if not carried:
        return Decays(a, None, p, s, None)
    since = glide_BHN.exp()
    return Decays(a, (alpha @ since[..., None])[..., 0], p, s, since[..., -1])


def read(memory: Memory, q_BHNK: Tensor, heard: Sequence[Tensor], deltas: Sequence[Tensor], within: Decays) -> Tensor:
    """y_t = M_t(q_t) of tokens that continue ``memory``."""
    x = q_BHNK
    for layer, weight in enumerate(memory.now):
        x = F.silu(x) if layer else x
        y = within.a[..., None] * apply(weight, x) - ((x @ heard[layer].mT) * within.p) @ deltas[layer]
        if within.b is not None:
            y = y + within.b[..., None] * apply(memory.momentum[layer], x)
        x = y
    return x if len(memory.now) == 1 else q_BHNK + x


def write(memory: Memory, heard: Sequence[Tensor], deltas: Sequence[Tensor], within: Decays) -> Memory:
    """The memory behind the window; ``base`` stays."""
    now, momentum = [], []
    a, p = within.a[..., -1, None, None], within.p[..., -1, :, None]
    for layer, weight in enumerate(memory.now):
        new = a * weight - (p * deltas[layer]).mT @ heard[layer]
        if within.s is not None:
            new_s = -(within.s[..., None] * deltas[layer]).mT @ heard[layer]
            if within.b is not None and within.e is not None:
                new = new + within.b[..., -1, None, None] * memory.momentum[layer]
                new_s = new_s + within.e[..., None, None] * memory.momentum[layer]
            momentum.append(new_s)
        now.append(new)
    return Memory(memory.base, tuple(now), tuple(momentum))


def token_by_token(
    first: Weights, memory: Memory, tokens: Tokens, positions_BT: Tensor, chunk: int, bound: float, horizon: int
) -> tuple[Tensor, Memory]:
    """The recurrence as it is written: y (B, H, N, K) and the memory after it.

    first: M at a document's start. horizon: chunks of a document after which gradients stop, 0 = never.
    """
    found = []
    for t in range(positions_BT.shape[1]):
        q, k, v = (each[:, :, t : t + 1] for each in (tokens.q, tokens.k, tokens.v))
        begins, ends = (
            each[:, None, None, None] for each in (positions_BT[:, t] == 0, (positions_BT[:, t] + 1) % chunk == 0)
        )
        base, now = (
            tuple(torch.where(begins, m, w) for m, w in zip(first, weights, strict=True))
            for weights in (memory.base, memory.now)
        )
        momentum = tuple(s.masked_fill(begins, 0.0) for s in memory.momentum)
        heard, deltas = errors(base, k, v, bound)
        step = [-tokens.rate[:, :, t, None, None] * d.mT * a for d, a in zip(deltas, heard, strict=True)]
        if tokens.glide is not None:
            eta = tokens.glide[:, :, t, None, None].exp()
            step = [eta * s + new for s, new in zip(momentum, step, strict=True)]
            momentum = tuple(step)
        keep = tokens.keep[:, :, t, None, None].exp()
        now = tuple(keep * w + s for w, s in zip(now, step, strict=True))
        found.append(recall(now, q))
        if horizon:
            stops = ends & (((positions_BT[:, t] + 1) // chunk) % horizon == 0)[:, None, None, None]
            now, momentum = (tuple(torch.where(stops, w.detach(), w) for w in ws) for ws in (now, momentum))
        base = tuple(torch.where(ends, w, old) for w, old in zip(now, base, strict=True))
        memory = Memory(base, now, momentum)
    return torch.cat(found, dim=2), memory
