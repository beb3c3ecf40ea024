"""Miniatures of what was wrong with recursive halting where we found it; each is ours with one line taken back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from miniature import breaks

from stepladder.models.mixers.held import Holding
from stepladder.models.recurrences.recursive_halting import RecursiveHalting
from stepladder.models.zoo.recursive_halting import RecursiveHaltingModel


class Recursive(RecursiveHaltingModel):
    """The architecture itself, its recurrence exchanged. Not registered."""

    tiny: ClassVar[dict[str, Any]] = {**RecursiveHaltingModel.tiny, "kind": ""}
    Core: ClassVar[type[RecursiveHalting]] = RecursiveHalting

    def build(self, vocab):
        model = super().build(vocab)
        model.core.__class__ = self.Core
        return model


class HealthyRecursive(Recursive):
    """Keeps every law."""


@breaks(
    cost="FLOPs per token, .* are executed",
    budget="FLOPs per token are executed instead of",
)
class WastedPass(Recursive):
    """The body runs once more than there are states to weigh: K + 1 passes for K ticks, and nobody reads the last."""

    class Core(RecursiveHalting):
        def forward(self, x_BTD, state, ctx):
            h_BTD, state = super().forward(x_BTD, state, ctx)
            plan = self._planner().plan(None, x_BTD, ctx)
            self.body(x_BTD, tuple(each and Holding(None, plan) for each in state[0]), ctx)
            return h_BTD, state


@breaks(
    rows="document B|left padding",
    chunk="moved by .*chunks of one token",
)
class PositionsOfTheFirstTick(Recursive):
    """Document masks and positions are told to the first tick only; the others see one long document."""

    class Core(RecursiveHalting):
        def _tick(self, s_BTD, again_BTD, shown, rows_R, modulation, gate_D, ctx):
            if ctx.tick and rows_R is None:
                here_BT = torch.arange(s_BTD.shape[1]).expand(len(s_BTD), -1)
                past = shown[self.first].past
                plan = self._planner().plan(past, s_BTD, replace(ctx, positions_BT=here_BT))
                shown = tuple(each and replace(each, plan=plan) for each in shown)
            return super()._tick(s_BTD, again_BTD, shown, rows_R, modulation, gate_D, ctx)


@breaks(chunk="moved by", rows="moved by")
class NotHeld(Recursive):
    """Keys and values of a halted token go on changing for as long as any companion keeps the loop going."""

    class Core(RecursiveHalting):
        def _tick(self, s_BTD, again_BTD, shown, rows_R, modulation, gate_D, ctx):
            shown = tuple(each and replace(each, running_BT=torch.ones_like(ctx.positions_BT).bool()) for each in shown)
            return super()._tick(s_BTD, again_BTD, shown, rows_R, modulation, gate_D, ctx)


@breaks(chunk="moved by .*(chunks of one token|uneven chunks)")
class ForgetsStoppedRows(Recursive):
    """Rows that are left out of a tick in decoding leave no keys and values for it."""

    class Core(RecursiveHalting):
        def _tick(self, s_BTD, again_BTD, shown, rows_R, modulation, gate_D, ctx):
            if rows_R is not None:
                shown = tuple(each and replace(each, kv_BTGK=torch.zeros_like(each.kv_BTGK)) for each in shown)
            return super()._tick(s_BTD, again_BTD, shown, rows_R, modulation, gate_D, ctx)


@breaks(causal="loss 'deep' .*moved|loss 'deep' has shape")
class LessonsAveragedOverTime(Recursive):
    """What deep supervision says at a token is the mean over the sequence, later targets included."""

    class Core(RecursiveHalting):
        def _lessons(self, nll_KBT, states, progress, ctx):
            super()._lessons(nll_KBT.mean(-1, keepdim=True).expand_as(nll_KBT), states, progress, ctx)


@breaks(rows="loss 'ponder' moved by .*half of the targets not scored")
class FreeWhereNothingIsScored(Recursive):
    """Ticks cost nothing at tokens that are not scored, though their price has nothing to do with a target."""

    class Core(RecursiveHalting):
        def _lessons(self, nll_KBT, states, progress, ctx):
            super()._lessons(nll_KBT, states, progress, ctx)
            ctx.add_loss("ponder", -torch.where(nll_KBT[0] == 0, ctx.sink.losses["ponder"], 0.0))


@breaks(reach="get no gradient in 5 batches: core.halting")
class HeadThatWeighsNothing(Recursive):
    """The halting mass weighs no output and the price is a number: the head never learns (the ancestors' S7)."""

    class Core(RecursiveHalting):
        def forward(self, x_BTD, state, ctx):
            halting = self.halting
            self.__dict__["halting"] = lambda *args: tuple(_cut(each) for each in halting(*args))
            try:
                self.__dict__["halting"].__dict__.update(
                    start=halting.start, draws=False, learns=False, charge=lambda weights, ticks: None
                )
                return super().forward(x_BTD, state, ctx)
            finally:
                del self.__dict__["halting"]


def _cut(each):
    if isinstance(each, torch.Tensor):
        return each.detach()
    return replace(each, left=each.left.detach(), expected=each.expected.detach(), offer=each.offer.detach())
