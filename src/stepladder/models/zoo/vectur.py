"""VecTur: vector Turing machines in the place of attention."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from stepladder.core.config import Field
from stepladder.core.errors import UserError
from stepladder.models.layers import residual_gain
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.vectur import Form, Symbols, VecTur
from stepladder.models.spec import Macro, architecture
from stepladder.models.stack import Stack

TINY = {"width": 16, "depth": 2, "inner": 8, "heads": 3, "ticks": 3, "chunk": 4, "cells": 5}


@architecture("vectur", tiny=TINY)
class VectorTuring(Macro):
    """Blocks of VecTur and SwiGLU: against ``transformer``, the mixer is the one thing that differs.

    Source: "Vector Turing Machines", the draft paper of the research system VecTur, which has no results yet, and the
    system itself (spec "vectur", 2). models.mixers.machine has the equations, models.mixers.vectur the forms. Differs
    from the paper in, and why:

    - Causality. There one machine reads the whole sequence and every position gets its tape, so no figure of it is
      one of a language model. Here a position's machine reads the tokens up to it (form prefix, exact), chunks of
      them, or one token after the other; the original, ``form: bidirectional``, is refused here and is for encoders.
    - Start. There Q_0, theta_0, w_0 and kappa are full matrices on a sequence of fixed length (in its code: sums over
      tokens). Here they come from the own token and the mean over the prefix: any length, one scale at all of them.
    - Heads. Angles are measured from the own cell, and heads begin 1 to N / 2 pi cells behind it: there they began as
      a hash of the input, and in float32 an angle from cell 0 loses log2 N bits where most reads are. What the input
      adds is bounded, from about a cell for the first head up to ``spread``; a tick moves by ``reach`` cells at most.
      Of k heads on fewer than k cells all are used; there only as many as cells. w_0 is about 1 / k.
    - Bounds. Updates pass through tanh, there through nothing (in its code: clamps, and one of the whole tape, which
      would destroy the rank-one form). Networks that feed back start at the scale 1 / sqrt(2 ticks).
    - Gate. |Q - q_0|^2 is a mean over channels, and 1 + it stands for max(1, it): at every width kappa t / (...) starts
      near 1 at the last tick, and the slope is never lost. The gate is shifted to reach 0 where the machine halts:
      there it stopped at a gate of epsilon with a jump (in its code: once all machines of the batch had).
    - Networks. One hidden layer for D_theta and D_w, one angle at a time (there D_theta saw all of them at once);
      kappa from Q_0. D_T, D_theta, D_w get the old Q as in the paper, not the new one as in its code.
    - Output. [T[j]; S; Q] after the last tick, normed; there T[j] alone, which most machines never write to.

    Executed ticks ("ticks" in the trace) are those with an open gate, in the block that took most. Without gradients a
    block's loop ends when no machine of it runs; with gradients every tick is computed and a halted one weighs 0.
    FLOPs count ``ticks``. Initial placement makes rounding grow with the context: docs/vectur.md has figures.
    """

    inner: int | None = Field(None, ge=1, description="width M of a tape cell and of the control; default width / 4")
    heads: int = Field(8, ge=1, description="heads k of a machine")
    ticks: int = Field(4, ge=2, description="tick budget of a machine; form stream: ticks per token")
    expand: int = Field(2, ge=1, description="hidden widths of a machine's networks as a multiple of inner")
    halt: float = Field(
        0.1, gt=0, lt=0.5, description="a machine halts when its gate, 1/2 at first, has fallen to this"
    )
    reach: float = Field(1.0, gt=0, description="cells by which a head may move in a tick, at most")
    spread: float = Field(
        0.75, ge=0, le=1, description="the input places the last head within about (N / 2 pi)^spread of N cells"
    )
    form: Form = Field("prefix", description="prefix: a machine per token; chunk: per chunk; stream: one for ever")
    chunk: int = Field(16, ge=1, description="form chunk: tokens from one machine to the next")
    cells: int = Field(64, ge=1, description="form stream: cells of the ring")
    tape: Literal["rank_one", "explicit"] = Field(
        "rank_one", description="tapes as sums of writes, or scattered to one by one; speed, not the function"
    )

    twins: ClassVar[tuple[dict[str, Any], ...]] = ({"tape": "explicit"},)

    def mixer(self, random: Symbols | None = None, draws: int = 1) -> VecTur:
        """The machine of one block."""
        return VecTur(
            self.width,
            self.inner or max(1, self.width // 4),
            self.heads,
            self.expand,
            self.ticks,
            self.halt,
            self.reach,
            self.spread,
            form=self.form,
            chunk=self.chunk,
            cells=self.cells,
            tape=self.tape,
            random=random,
            draws=draws,
            gain=residual_gain(self.depth),
        )

    def build(self, vocab: int) -> LanguageModel:
        if self.form == "bidirectional":
            raise UserError(
                "form: bidirectional hears the future, so a language model's loss would be void; it is for encoders "
                "(models.mixers.vectur.VecTur); take prefix, chunk or stream"
            )
        parts = [part for _ in range(self.depth) for part in self.block(self.mixer(), self.depth)]
        return LanguageModel(vocab, self.width, Stack(parts), tied=self.tied)
