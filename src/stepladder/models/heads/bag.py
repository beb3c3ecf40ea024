"""The bag of words of a planner's chunk (BOW): a plan should tell at once what words its chunk will hold.

    q_k(v) = mean over the chunk's predictions of p_k(v)      - mean over its words w of LSE_k(b_k + log q_k(w))

with b the belief at the chunk's start. A chunk's words are those from one move of the chain to the next, and its
predictions are the distributions of these words, each heard one token earlier. Told where the chunk ends, times the
chunk's length. Of all numbers of words x vocabulary only the chunk's own words are computed.

Suffixes as in models.base, and: K plans, E chunks that end in a call, M words of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepladder.models.base import IGNORE, Context
from stepladder.models.heads.belief import rows
from stepladder.models.heads.experts import Experts


@dataclass(frozen=True)
class Remembered:
    """Hidden states, normalisers of the experts and ids of the last M tokens, the newest last."""

    h_BMD: Tensor
    lse_BMK: Tensor
    ids_BM: Tensor

    @staticmethod
    def start(like_BK: Tensor, words: int, width: int) -> Remembered:
        """Zeros, which are never read."""
        batch, plans = like_BK.shape
        lse_BMK = like_BK.new_zeros(batch, words, plans)
        return Remembered(like_BK.new_zeros(batch, words, width), lse_BMK, lse_BMK[..., 0].long())


def bag_of_words(
    experts: Experts,
    h_BTD: Tensor,
    lse_BTK: Tensor,
    ids_BT: Tensor,
    chosen_BTK: Tensor,
    boundary_BT: Tensor,
    state: Remembered,
    ctx: Context,
    scored: bool,
) -> tuple[Tensor | None, Remembered]:
    """The term (B, T), if the call is scored, and what to carry on.

    ids: IGNORE where a token is no word. chosen: the belief that a token's chunk began with, as known before the token.
    """
    words, tokens = state.ids_BM.shape[1], h_BTD.shape[1]
    told = h_BTD.to(state.h_BMD.dtype), lse_BTK, ids_BT
    before = state.h_BMD, state.lse_BMK, state.ids_BM
    h_BSD, lse_BSK, ids_BS = (torch.cat(each, 1) for each in zip(before, told, strict=True))
    kept = Remembered(*(each[:, -words:].clone() for each in (h_BSD, lse_BSK, ids_BS)))
    if not scored:
        return None, kept

    count_BT = boundary_BT.cumsum(1)
    number = torch.arange(1, -(-tokens // words) + 1, device=h_BTD.device).expand(len(h_BTD), -1)
    index_BE = torch.searchsorted(count_BT, number.contiguous()).clamp(max=tokens - 1)
    back_M = torch.arange(words, device=h_BTD.device)
    place_BEM = index_BE[..., None] + back_M  # in S, of a word's prediction; the word itself comes behind it
    ids_BEM = ids_BS.gather(1, (place_BEM + 1).flatten(1)).view_as(place_BEM)
    # A document's first word was never predicted.
    meant_BEM = (ctx.positions_BT.gather(1, index_BE)[..., None] - words + back_M >= 0) & (ids_BEM != IGNORE)
    shape = *place_BEM.shape, -1
    # A fill: whatever a finished document left behind, be it infinite, leaves no slope either.
    h_BEMD, lse_BEMK = (
        rows(each, place_BEM.flatten(1)).view(shape).masked_fill(~meant_BEM[..., None], 0.0)
        for each in (h_BSD, lse_BSK)
    )
    chunks = (each.flatten(0, 1) for each in (h_BEMD, lse_BEMK, ids_BEM.clamp(min=0), meant_BEM))
    expected_BEMK = experts.expected(*chunks).view(shape)
    miss_BEM = -(rows(chosen_BTK, index_BE)[:, :, None] + expected_BEMK).logsumexp(-1)
    mean_BE = torch.where(meant_BEM, miss_BEM, 0.0).sum(-1) / meant_BEM.sum(-1).clamp(min=1)
    term_BT = rows(words * mean_BE[..., None], (count_BT - 1).clamp(min=0))[..., 0]
    return torch.where(boundary_BT, term_BT, 0.0), kept
