"""Miniatures of what went wrong in vector Turing machines (S1-S4), each caught by a law or shown by the probe.

Every one is a small architecture by the one-file recipe, a Spec that builds a model. None is registered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from miniature import Memory, Mini, breaks
from torch import nn
from torch.utils.checkpoint import checkpoint

from stepladder.models.mixers.machine import Machine
from stepladder.models.mixers.vectur import VecTur


class _Machines(Mini):
    """The macro architecture with vector Turing machines of class ``Mixer``."""

    Mixer = VecTur
    changed: ClassVar[dict[str, Any]] = {}

    def mixer(self):
        fields = {"form": "prefix", "chunk": 4, "cells": 5, "tape": "rank_one", "random": None, "draws": 1, "gain": 0.5}
        return self.Mixer(self.width, 8, 3, 2, 3, 0.1, 1.0, 0.75, **{**fields, **self.changed})


@breaks(
    repeat="gradient of .*decay.*recomputed activations|gradient of .*recomputed activations",
    twin="gradient of .*recomputed activations",
)
class LateBoundTick(Mini):
    """S1 inside the machine: recomputation captures the tick, so every gate is recomputed with the last one's t."""

    class Mixer(Memory):
        def __init__(self, width):
            super().__init__(width)
            self.kappa = nn.Parameter(torch.ones(width))

        def forward(self, x_BTD, state, ctx):
            q_BTD, state = super().forward(x_BTD, state, ctx)
            for tick in range(3):
                if ctx.recompute:
                    step = lambda q: q + torch.sigmoid(-self.kappa * tick) * torch.tanh(q)  # noqa: E731
                    q_BTD = checkpoint(step, q_BTD, use_reentrant=False, preserve_rng_state=False)
                else:
                    q_BTD = q_BTD + torch.sigmoid(-self.kappa * tick) * torch.tanh(q_BTD)
            return q_BTD, state


@breaks(causal="logits moved by .*eval mode, one document", noise="nats below ln 8")
class HearsTheFuture(_Machines):
    """S2: the original form, one machine over the whole sequence, in a language model all the same."""

    changed: ClassVar[dict[str, Any]] = {"form": "bidirectional"}


@breaks(chunk="logits moved by .*chunks of one token")
class ForgetsItsTape(_Machines):
    """S3: nothing is carried, so decoding runs a machine over a tape of one cell."""

    class Mixer(VecTur):
        def forward(self, x_BTD, state, ctx):
            place_T = torch.arange(x_BTD.shape[1])
            return super().forward(x_BTD, None, replace(ctx, positions_BT=place_T.expand(x_BTD.shape[:2])))[0], None


class SumsAndLongSteps(_Machines):
    """S4: starts from sums, not means; angles start anywhere and move by up to a radian a tick, unscaled feedback.

    No law (how chaotic it is depends on length and ticks), but the probe must show it.
    """

    class Mixer(VecTur):
        class Sums(Machine):
            def start(self, x_BED, past_BEP, at):
                begun = super().start(x_BED, past_BEP * at.cells_BE[..., None], at)
                return replace(begun, angle_BEH=begun.angle_BEH * at.circle[..., None] / 4)

        def __init__(self, width, inner, heads, expand, *rest, **fields):
            super().__init__(width, inner, heads, expand, *rest, **fields)
            self.machine = self.Sums(width, width, inner, heads, expand, ticks=1, halt=1e-3, reach=1e3, spread=1.0)
            self.ticks = 32


@breaks(rows="logits moved by .*after changing all other rows", causal="logits moved by .*eval mode")
class NextRowsTape(Mini):
    """A head just below a whole turn reads cell N: what comes behind the tape, in the end the next row's first cell."""

    class Mixer(Memory):
        def scan(self, v_BTD, state, ctx):
            s_BTD, last = super().scan(v_BTD, state, ctx)
            return s_BTD + v_BTD.flatten(0, 1).roll(-1, 0).view_as(v_BTD), last


@breaks(chunk="logits moved by .*chunks of one token", rows="document B alone|left padding")
class SymbolsOfTheCall(_Machines):
    """Random symbols keyed by the place in the call, not by the position in the document."""

    changed: ClassVar[dict[str, Any]] = {"random": "rademacher"}

    class Mixer(VecTur):
        def _cells(self, x_BTD, ctx):
            place_T = torch.arange(x_BTD.shape[1])
            return super()._cells(x_BTD, replace(ctx, positions_BT=place_T.expand(x_BTD.shape[:2])))
