"""Miniatures of what went wrong in the planner's ancestor (spec "apelr", 2, 3 and 9), each caught by a law.

Every one is apelr_v2 in the tiny configuration with one method of its head replaced. None is registered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from miniature import breaks

from stepladder.models.heads.belief import Belief
from stepladder.models.heads.plan_losses import PlanLosses
from stepladder.models.heads.planner import PlannerHead
from stepladder.models.zoo.apelr import TINY, PlannerRequired


class _Planned(PlannerRequired):
    """apelr_v2 with a head of class ``Head`` and losses of class ``Losses``."""

    tiny: ClassVar[dict[str, Any]] = {**TINY, "heads": 2}
    Head: ClassVar[type[PlannerHead]] = PlannerHead
    Losses: ClassVar[type[PlanLosses]] = PlanLosses

    def build(self, vocab):
        model = super().build(vocab)
        model.head.__class__, model.head.losses.__class__ = self.Head, self.Losses
        return model


@breaks(chunk="moved by .*chunks of one token")
class PromptNotFiltered(_Planned):
    """Generation that does not absorb its prompt: what a call begins with is no evidence."""

    class Head(PlannerHead):
        def _surprise(self, start, ctx):
            return torch.zeros_like(start.now_BK)


@breaks(chunk="moved by .*chunks of one token|greedy decoding differs")
class EpsilonByCall(_Planned):
    """An epsilon added whenever a belief is logged: once a chunk in training, once a token in generation."""

    class Head(PlannerHead):
        def _filter(self, h, lse, said, told, first, before):
            floor = torch.tensor(1e-3).to(before.now).log()
            now = torch.logaddexp(before.now, floor).log_softmax(-1)
            return super()._filter(h, lse, said, told, first, Belief(now, before.chosen))


@breaks(rows="moved by .*half of the targets not scored", twin="nll moved by")
class FiltersByTarget(_Planned):
    """Evidence from the target where there is one: in training the answer, in generation the token."""

    class Head(PlannerHead):
        def _nll(self, h, ids, told, first, start, targets):
            ids = torch.cat((targets.clamp(min=0)[..., None], ids[..., 1:]), -1)
            return super()._nll(h, ids, told, first, start, targets)


@breaks(causal="moved by .*after changing tokens")
class SummaryOfAChunkToCome(_Planned):
    """Chunks off by one: a move hears the hidden state of the token after it."""

    class Head(PlannerHead):
        def _told(self, h, start, ctx):
            told = super()._told(h, start, ctx)
            return replace(told, context_BTK=torch.cat((told.context_BTK[:, 1:], told.context_BTK[:, -1:]), 1))


@breaks(chunk="moved by .*chunks of one token")
class ChunksOfTheCall(_Planned):
    """Moves counted in the call and not in the document: chunks begin anew with every call."""

    class Head(PlannerHead):
        def _told(self, h, start, ctx):
            place = torch.arange(h.shape[1]).expand(h.shape[:2])
            told = super()._told(h, start, replace(ctx, positions_BT=place))
            return replace(told, start_BT=ctx.positions_BT == 0)


@breaks(rows="loss 'usage' moved by .*after changing all other rows", causal="loss 'usage' moved by")
class UsageOfTheBatch(_Planned):
    """Usage from the mean belief of a batch: a row's loss depends on the rows beside it and on what comes later."""

    class Losses(PlanLosses):
        def forward(self, heard, experts, state, ctx, scored):
            kept = super().forward(heard, experts, state, ctx, scored)
            if scored:
                mean = heard.belief.chosen.exp().mean((0, 1))
                ctx.sink.losses["usage"] = (mean * mean.log()).sum().expand(ctx.positions_BT.shape)
            return kept
