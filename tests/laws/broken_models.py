"""Miniatures that each break a law about the model itself: reach, start, cost, budget, repeat, resume, twin, export.

Every one is a small architecture by the one-file recipe, a Spec that builds a model. None is registered.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from miniature import Looped, Memory, Mini, OneHead, PlainLoop, breaks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepladder.core.config import Field
from stepladder.core.errors import UserError
from stepladder.models.base import Context, Cost
from stepladder.models.noise import Dropout
from stepladder.models.recurrences.once import Once
from stepladder.models.stack import Stack

# ------------------------------------------------------------------------------------------------ reach, start


@breaks(reach=r"2 of 13 parameters get no gradient .*core\.halt\.bias, core\.halt\.weight")
class PonderWithoutGradient(Looped):
    """S7: the ponder term is a float and the halting probability weighs no output: nothing reaches the head."""

    class Recurrence(PlainLoop):
        def __init__(self, core, width, ticks):
            super().__init__(core, width, ticks)
            self.halt = nn.Linear(width, 1)

        def forward(self, x_BTD, state, ctx):
            y_BTD, state = super().forward(x_BTD, state, ctx)
            ponder = self.halt(y_BTD).sigmoid().mean().item()
            ctx.add_loss("ponder", torch.full_like(y_BTD[..., 0], ponder))
            return y_BTD, state


@breaks(reach="no update, the gradient norm is nan")
class InfiniteSlope(Mini):
    """The gradient of a square root at zero."""

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            return super().forward(x_BTD + (x_BTD - x_BTD).sqrt(), state, ctx)


@breaks(start="the first loss is")
class LoudHead(Mini):
    """A head of unit scale, as tied embeddings give without further care."""

    def build(self, vocab):
        model = super().build(vocab)
        nn.init.normal_(model.head.own.weight)
        return model


@breaks(start="at length 128, ticks=20")
class GrowsWithTicks(Looped):
    """A loop without a norm: finite at its own tick count, not at four times as many."""

    class Recurrence(PlainLoop):
        def forward(self, x_BTD, state, ctx):
            y_BTD, state = super().forward(x_BTD, state, ctx)
            return y_BTD * 1e3 ** len(state), state


@breaks(start="the first loss is nan nats at length 128")
class GrowsWithLength(Mini):
    """exp(position): finite at the training length only."""

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            return super().forward(x_BTD * ctx.positions_BT[..., None].to(x_BTD).exp(), state, ctx)


# ------------------------------------------------------------------------------------------------ cost, budget


class _Lie(Mini):
    class Mixer(Memory):
        def cost(self, context, ticks=None):
            return self.lie(super().cost(context, ticks))

    def mixer(self):
        mixer = self.Mixer(self.width)
        mixer.lie = self.lie
        return mixer


@breaks(cost="FLOPs per token")
class FlopsUnderstated(_Lie):
    """Says that one of its two maps is free."""

    def lie(self, cost):
        return Cost(cost.params, cost.flops / 2, cost.state_bytes)


@breaks(cost="cost says 5,680 parameters, there are 5,712")
class ParametersForgotten(_Lie):
    """Forgets its smallest parameter."""

    def lie(self, cost):
        return Cost(cost.params - self.width, cost.flops, cost.state_bytes)


@breaks(cost="cost says a state of 24 bytes")
class StateForgotten(_Lie):
    """Claims to carry nothing."""

    def lie(self, cost):
        return Cost(cost.params, cost.flops, 0)


@breaks(budget="asked for ticks=1, reported 5")
class IgnoresTicks(Looped):
    """Runs its own number of ticks whatever is asked for."""

    class Recurrence(PlainLoop):
        def forward(self, x_BTD, state, ctx):
            return super().forward(x_BTD, state, replace(ctx, ticks=None))


@breaks(budget="asked for ticks=1, reported 1, but", cost="FLOPs per token")
class ReportsWhatWasAsked(IgnoresTicks):
    """The same, and reports the ticks that were asked for."""

    class Recurrence(IgnoresTicks.Recurrence):
        def forward(self, x_BTD, state, ctx):
            out = super().forward(x_BTD, state, ctx)
            ctx.note("ticks", torch.full_like(ctx.positions_BT, ctx.ticks or self.ticks))
            return out


@breaks(budget="must tell the executed ticks")
class TellsNothing(Mini):
    """A recurrence that does not report its ticks."""

    class Recurrence(Once):
        def forward(self, x_BTD, state, ctx):
            if ctx.ticks not in (None, 1):
                raise UserError("no loop here; leave ticks out")
            return self.core(x_BTD, state, ctx)


@breaks(budget="execute .*FLOPs per token: not more for more")
class SilentlyOnce(Mini):
    """No loop, but takes a tick budget without a word."""

    class Recurrence(Once):
        def forward(self, x_BTD, state, ctx):
            ctx.note("ticks", torch.ones_like(ctx.positions_BT))
            return self.core(x_BTD, state, ctx)


@breaks(budget="ticks=1, when all tokens report that many")
class SaysOneTick(Looped):
    """Halting that reports less than it executes, and whose later ticks do matter."""

    class Recurrence(PlainLoop):
        def forward(self, x_BTD, state, ctx):
            out = super().forward(x_BTD, state, ctx)
            ctx.note("ticks", torch.ones_like(ctx.positions_BT))
            return out


# ------------------------------------------------------------------------------------------------ repeat, resume


@breaks(repeat="global random generator")
class UnseededNoise(Mini):
    """Noise from torch's global generator, also in eval mode."""

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            return super().forward(x_BTD + 0.01 * torch.randn_like(x_BTD), state, ctx)


@breaks(repeat="another key gives the same dropout")
class KeyIgnored(Mini):
    """Dropout with one and the same mask for ever."""

    class FixedDropout(Dropout):
        def forward(self, x_BTD, ctx):
            return super().forward(x_BTD, replace(ctx, key_B=torch.zeros_like(ctx.key_B)))

    def build(self, vocab):
        model = super().build(vocab)
        for part in model.core.core.parts:
            part.dropout = self.FixedDropout(self.dropout)
        return model


@breaks(repeat="global random generator")
class TorchDropout(Mini):
    """torch's own dropout: drawn anew when activations are recomputed."""

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            return super().forward(F.dropout(x_BTD, 0.1, self.training), state, ctx)


@breaks(repeat="after another batch")
class StateOnSelf(Mini):
    """The memory of the last call is kept on the module and starts the next one."""

    class Mixer(Memory):
        kept: Tensor | None = None

        def forward(self, x_BTD, state, ctx):
            fits = self.kept is not None and self.kept.shape == x_BTD[:, 0].shape
            y_BTD, after = super().forward(x_BTD, state, ctx)
            if fits:
                y_BTD = y_BTD + self.kept[:, None]
            self.kept = after.detach()
            return y_BTD, after


@breaks(repeat="after another batch")
class RunningMean(Mini):
    """A buffer that train mode updates: forward is not a function."""

    class Mixer(Memory):
        def __init__(self, width):
            super().__init__(width)
            self.register_buffer("mean", torch.zeros(width))

        def forward(self, x_BTD, state, ctx):
            y = super().forward(x_BTD - self.mean, state, ctx)
            if self.training:
                self.mean.lerp_(x_BTD.detach().mean((0, 1)), 0.1)
            return y


@breaks(resume="after save and load")
class CountsCalls(Mini):
    """A warm-up kept in a Python attribute: it starts again after every resumption."""

    class Mixer(Memory):
        calls = 0

        def forward(self, x_BTD, state, ctx):
            y_BTD, state = super().forward(x_BTD, state, ctx)
            self.calls += self.training and torch.is_grad_enabled()
            return y_BTD * (1 - 0.5**self.calls), state


@breaks(resume="after save and load", export="rebuilt from its files")
class UnsavedBuffer(Mini):
    """A random projection in a buffer that no file holds."""

    class Mixer(Memory):
        def __init__(self, width):
            super().__init__(width)
            self.register_buffer("projection", torch.randn(width, width), persistent=False)

        def forward(self, x_BTD, state, ctx):
            return super().forward(x_BTD @ self.projection, state, ctx)

        def cost(self, context, ticks=None):
            return super().cost(context, ticks) + Cost(0, 2 * self.projection.numel())


@breaks(resume="after save and load")
class StateBesideTheState(Mini):
    """Part of the sequence state lives outside the tree of tensors, in a table on the module."""

    class Mixer(Memory):
        def __init__(self, width):
            super().__init__(width)
            self.table: dict[int, Tensor] = {}

        def forward(self, x_BTD, state, ctx):
            kept = None if state is None else self.table.get(int(state[0, 0]), torch.zeros_like(x_BTD[:, 0]))
            y_BTD, after = super().forward(x_BTD, kept, ctx)
            ticket = len(self.table) + 1
            self.table[ticket] = after.detach()
            return y_BTD, torch.full_like(after, ticket)


# ------------------------------------------------------------------------------------------------ twin, export


@breaks(twin="gradient of .*recomputed activations", repeat="gradient of .*recomputed activations")
class LateBoundRecomputation(Mini):
    """S1: recomputation captures the loop variable, so every layer is recomputed with the last one's weights."""

    tiny: ClassVar[dict[str, Any]] = {"width": 16, "depth": 3}

    class Layers(Stack):
        def forward(self, x_BTD, state, ctx):
            if not ctx.recompute:
                return super().forward(x_BTD, state, ctx)
            after = []
            for index, part in enumerate(self.parts):
                before = None if state is None else state[index]
                x_BTD, carried = checkpoint(
                    lambda x, before=before: part(x, before, ctx), x_BTD, use_reentrant=False, preserve_rng_state=False
                )
                after.append(carried)
            return x_BTD, tuple(after)

    def build(self, vocab):
        model = super().build(vocab)
        mixers = [part for part in model.core.core.parts if isinstance(part.part, Memory)]  # alike, so shapes agree
        model.core = Once(self.Layers(mixers))
        return model


class _Twins(Mini):
    twins: ClassVar[tuple[dict[str, Any], ...]] = ({"fast": True},)
    fast: bool = Field(False)

    def mixer(self):
        return self.Fast(self.width) if self.fast else Memory(self.width)


@breaks(twin="gradient of .*decay moved")
class TwinWithOtherGradient(_Twins):
    """The fast path gives equal outputs and forgets the gradient of one parameter."""

    class Fast(Memory):
        def scan(self, v_BTD, state, ctx):
            decay = self.decay
            self.decay = nn.Parameter(decay.detach())
            found = super().scan(v_BTD, state, ctx)
            self.decay = decay
            return found


@breaks(twin="state core.0 moved by .*length 2")
class TwinWithOtherState(_Twins):
    """Equal outputs and gradients; the final state is the one before the last token."""

    class Fast(Memory):
        def scan(self, v_BTD, state, ctx):
            s_BTD, last = super().scan(v_BTD, state, ctx)
            return s_BTD, s_BTD[:, -2] if v_BTD.shape[1] > 1 else last


@breaks(twin="logits moved by .*length 65")
class TwinAtPowersOfTwo(_Twins):
    """A chunked path that is wrong from the 65th token on."""

    class Fast(Memory):
        def scan(self, v_BTD, state, ctx):
            borders = [0, *range(64, v_BTD.shape[1], 64), v_BTD.shape[1]]
            pieces = [
                super(type(self), self).scan(v_BTD[:, a:b], state, _part(ctx, a, b)) for a, b in pairwise(borders)
            ]
            return torch.cat([piece[0] for piece in pieces], 1), pieces[-1][1]


def _part(ctx: Context, first: int, last: int) -> Context:
    return replace(ctx, positions_BT=ctx.positions_BT[:, first:last])


@breaks(twin="logits moved by .*documents left out")
class PlainMaskDiffers(Mini):
    """The causal fast path looks at one key less than the explicit document mask."""

    class Mixer(OneHead):
        def forward(self, x_BTD, state, ctx):
            y_BTD, state = super().forward(x_BTD, state, ctx)
            return y_BTD if ctx.packed else y_BTD + 1e-4 * x_BTD, state


@breaks(export="rebuilt from its files")
class HiddenField(Mini):
    """A hyperparameter that the JSON does not hold."""

    tiny: ClassVar[dict[str, Any]] = {"width": 16, "depth": 1, "scale": 3.0}
    scale: float = Field(1.0, exclude=True)

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            return super().forward(self.scale * x_BTD, state, ctx)

    def mixer(self):
        mixer = self.Mixer(self.width)
        mixer.scale = self.scale
        return mixer
