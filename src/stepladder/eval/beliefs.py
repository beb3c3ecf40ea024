"""What a planner did with texts: beliefs, likelihoods under every plan and under ablations, divergences of plans."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepladder.data.tokenizers import IGNORE
from stepladder.eval.decode import evaluating
from stepladder.models.base import Context
from stepladder.models.heads.plan_losses import boundary, information, pairs
from stepladder.models.heads.planner import PlannerHead
from stepladder.models.lm import LanguageModel

SAMPLED = 256
"""Tokens of a batch, at most, whose whole distributions are looked at."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "uniform": {"control": "uniform"},
    "prior": {"control": "frozen"},
    "no evidence": {"filtering": False},
    "no forecast": {"feedback": 0.0},
}
"""What is changed in a plan, by name."""


@contextmanager
def replanned(model: LanguageModel, **fields: Any) -> Iterator[None]:
    """Inside, a planner plans with other ``fields`` of its Plan (control, forced, feedback, ...); then as before."""
    head = planner_of(model)
    assert head is not None
    plan = head.plan
    try:
        head.plan = replace(plan, **fields)
        yield
    finally:
        head.plan = plan


def planner_of(model: LanguageModel) -> PlannerHead | None:
    """The planner, if the model's head is one."""
    head = getattr(model, "head", None)
    return head if isinstance(head, PlannerHead) else None


@dataclass(frozen=True)
class Given:
    """Texts in rows: int64 (B, T). targets: IGNORE where unscored. live: what is not padding. index: of the rows."""

    tokens: np.ndarray
    targets: np.ndarray
    documents: np.ndarray
    live: np.ndarray
    index: np.ndarray


@dataclass(frozen=True)
class Seen:
    """What a planner did with a batch, float64 or bool arrays (B, T, ...). K plans.

    begun: whether a chunk begins behind the token (or a document with it) and has a token. follows: begun, and another
    chunk of the document went before. nll: by name, 0 where unscored. forced: under every plan alone, (B, T, K).
    credit: plans by what they have to do with the next token, (B, T, K). sample: of ``sampled``.
    """

    belief: np.ndarray
    plan: np.ndarray
    place: np.ndarray
    begun: np.ndarray
    follows: np.ndarray
    nll: dict[str, np.ndarray]
    forced: np.ndarray
    credit: np.ndarray
    sample: Sample


@dataclass(frozen=True)
class Sample:
    """Of n tokens: information of the plan about the next one [n], divergences [n, pairs]; sum of p_k [K, V]."""

    information: np.ndarray
    divergence: np.ndarray
    words: np.ndarray


def look(model: LanguageModel, given: Given) -> Seen:
    """One forward, and the head again for every ablation."""
    with evaluating(model):
        return _look(model, given)


def _look(model: LanguageModel, given: Given) -> Seen:
    head, caught = planner_of(model), []
    assert head is not None
    device = next(model.parameters()).device
    parts = (given.tokens, given.targets, given.documents)
    tokens, targets, documents = (torch.from_numpy(part).to(device) for part in parts)
    hook = head.register_forward_pre_hook(lambda _, args: caught.append(args))
    try:
        out = model(tokens, targets=targets, documents=documents, trace=True)
    finally:
        hook.remove()
    h_BTD, ctx = caught[0][0], caught[0][2]
    nll = {"own": out.nll_BT}
    for name, fields in ABLATIONS.items():
        if any(getattr(head.plan, field) != value for field, value in fields.items()):
            with replanned(model, **fields):
                nll[name] = head(h_BTD, None, ctx, targets, None)[1]
    lse_NK, said_N1K = head.experts.score(h_BTD.flatten(0, 1), targets.clamp(min=0).flatten()[:, None])
    said_BTK = (said_N1K[:, 0] - lse_NK).view(*targets.shape, -1)
    scored = targets != IGNORE
    gate_BTK = out.trace["gate"]
    credit = (gate_BTK.double().log() + said_BTK.double()).softmax(-1)
    begun, follows = _chunks(head, ctx, torch.from_numpy(given.live).to(device))
    where = (scored & torch.from_numpy(given.live).to(device)).nonzero()
    where = where[:: max(1, -(-len(where) // SAMPLED))]
    sample = _sampled(head, h_BTD[where[:, 0], where[:, 1]], gate_BTK[where[:, 0], where[:, 1]])
    forced = torch.where(scored[..., None], -said_BTK, 0.0)
    return Seen(
        belief=_array(out.trace["belief"]),
        plan=_array(out.trace["plan"]),
        place=_array((ctx.positions_BT + head.plan.first) % head.plan.chunk),
        begun=_array(begun),
        follows=_array(follows),
        nll={name: _array(value) for name, value in nll.items()},
        forced=_array(forced),
        credit=_array(credit),
        sample=sample,
    )


def _array(x: Tensor) -> np.ndarray:
    return (x.double() if x.is_floating_point() else x).cpu().numpy()


def _chunks(head: PlannerHead, ctx: Context, live_BT: Tensor) -> tuple[Tensor, Tensor]:
    """``begun`` and ``follows`` of Seen: a move behind a document's last token begins nothing."""
    start_BT = ctx.positions_BT == 0
    moved_BT = boundary(ctx.positions_BT, head.plan.chunk, head.plan.first)
    more_BT = torch.zeros_like(start_BT)
    more_BT[:, :-1] = ~start_BT[:, 1:] & live_BT[:, 1:]
    begun_BT = (start_BT | moved_BT) & more_BT & live_BT
    return begun_BT, begun_BT & ~start_BT


def _sampled(head: PlannerHead, h_ND: Tensor, gate_NK: Tensor) -> Sample:
    found = []
    for h, gate in zip(h_ND.split(16), gate_NK.split(16), strict=True):
        logs = [logits.double().log_softmax(-1) for logits in head.experts.logits(h)]
        words_KV = torch.stack([each.exp().sum(0) for each in logs])
        found.append(
            (information(logs, gate.double().log()), torch.stack([*pairs(logs), gate[:, 0]], -1)[:, :-1], words_KV)
        )
    if not found:
        empty = np.zeros((0, head.plan.plans * (head.plan.plans - 1) // 2))
        return Sample(np.zeros(0), empty, np.zeros((head.plan.plans, head.experts.vocab)))
    told, apart, words = (list(each) for each in zip(*found, strict=True))
    return Sample(
        torch.cat(told).cpu().numpy(), torch.cat(apart).cpu().numpy(), torch.stack(words).sum(0).cpu().numpy()
    )
