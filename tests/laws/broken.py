"""Miniatures that each break a law about sequences: causal, noise, chunk, rows; as real systems did (S1-S12).

Every one is a small architecture by the one-file recipe, a Spec that builds a model. None is registered.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from miniature import HaltingLoop, Looped, Memory, Mini, OneHead, breaks
from torch import nn

from stepladder.models.heads.softmax import SoftmaxHead
from stepladder.models.mixers.attention import Cache

# ------------------------------------------------------------------------------------------------ causal, noise


@breaks(
    causal="logits moved by .*eval mode, one document",
    noise="nats below ln 8",
    chunk="logits moved by .*chunks of one token",
)
class SumOverSequence(Mini):
    """S2: the control state of a machine is a sum over the whole sequence."""

    class Mixer(Memory):
        def scan(self, v_BTD, state, ctx):
            s_BTD, last = super().scan(v_BTD, state, ctx)
            return s_BTD + v_BTD.mean(1, keepdim=True), last


@breaks(causal="logits moved by .*eval mode")
class ThoughtOfAll(Mini):
    """S5: thought tokens attend to all tokens and are added everywhere; a gate at zero hides it at the start."""

    class Mixer(Memory):
        def __init__(self, width):
            super().__init__(width)
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, x_BTD, state, ctx):
            y_BTD, state = super().forward(x_BTD, state, ctx)
            thought = F.scaled_dot_product_attention(x_BTD, x_BTD, x_BTD).mean(1, keepdim=True)
            return y_BTD + self.gate * thought, state


@breaks(causal="logits moved by .*train mode")
class TrainOnlyLeak(Mini):
    """Statistics over time in train mode, running ones in eval mode."""

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            return super().forward(x_BTD - x_BTD.mean(1, keepdim=True) if self.training else x_BTD, state, ctx)


@breaks(causal="loss 'balance' moved")
class LeakyLoss(Mini):
    """A named loss that holds, at every token, a mean over the sequence."""

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            ctx.add_loss("balance", x_BTD.square().mean((1, 2), keepdim=True)[..., 0].expand(ctx.tokens_BT.shape))
            return super().forward(x_BTD, state, ctx)


@breaks(causal="logits moved by .*second chunk")
class ChunkFallbackLeak(Mini):
    """The path with a carried state, which nobody benchmarks, forgets the mask inside the chunk."""

    class Mixer(OneHead):
        def forward(self, x_BTD, state, ctx):
            if state is None:
                return super().forward(x_BTD, state, ctx)
            qkv = self.project(x_BTD).unflatten(-1, (3, 1, self.head_width))
            q, k, v = qkv.unbind(2)
            state = Cache(torch.cat((state.k_BSGK, k), 1), torch.cat((state.v_BSGK, v), 1))
            y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, state.k_BSGK, state.v_BSGK)))
            return self.out(y.transpose(1, 2).flatten(2)), state


@breaks(noise="nats below ln 8", twin="nll moved.*against all logits and their softmax")
class DiscountedLikelihood(Mini):
    """A head whose likelihood does not add up to one: 5 % better for nothing. Perfectly causal."""

    class Head(SoftmaxHead):
        def nll(self, h_BTD, targets_BT):
            return 0.95 * super().nll(h_BTD, targets_BT)

    def build(self, vocab):
        model = super().build(vocab)
        model.head = self.Head(self.width, vocab)
        return model


@breaks(causal=r"loss 'balance' has shape \(\), not one number a token")
class LossOfTheBatch(Mini):
    """A named loss that is one number for the whole batch: nobody can weigh it by tokens."""

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            ctx.add_loss("balance", x_BTD.square().mean())
            return super().forward(x_BTD, state, ctx)


# ------------------------------------------------------------------------------------------------ chunk


@breaks(chunk="logits moved by .*chunks of one token")
class OnlyTheCurrentToken(Mini):
    """S3: nothing is carried, so decoding sees one token."""

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            return super().forward(x_BTD, None, ctx)[0], None


@breaks(chunk="logits moved by")
class BeliefResetAtChunks(Mini):
    """S11: training resets the belief every 8 tokens of a call, generation carries it."""

    class Mixer(Memory):
        def scan(self, v_BTD, state, ctx):
            pieces = []
            for piece in v_BTD.split(8, 1):
                y, last = super().scan(piece, state, ctx)
                pieces.append(y)
                state = 0.5 * last
            return torch.cat(pieces, 1), last


@breaks(chunk="logits moved by .*chunks of one token")
class PositionsOfTheCall(Mini):
    """Positions are counted from the start of the call, so cached decoding sits at position 0 for ever."""

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            return super().forward(x_BTD + torch.arange(x_BTD.shape[1])[:, None].cos().to(x_BTD), state, ctx)


@breaks(chunk="logits moved by|second time|wrote into")
class WritesIntoState(Mini):
    """G7: the state that was passed in is updated in place; a second request continues the first one's."""

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            y_BTD, after = super().forward(x_BTD, state, ctx)
            if state is None or torch.is_grad_enabled():
                return y_BTD, after
            return y_BTD, state.copy_(after)


@breaks(chunk="gradient of .*uneven chunks")
class DetachedState(Mini):
    """Outputs agree in chunks, gradients stop at every border."""

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            y_BTD, after = super().forward(x_BTD, state, ctx)
            return y_BTD, after.detach()


@breaks(chunk="9 tokens into a state for 8")
class WrapsAround(Mini):
    """G3: a preallocated cache that overwrites its oldest entry when it is full."""

    class Mixer(OneHead):
        def forward(self, x_BTD, state, ctx):
            full = not isinstance(state, Cache | None) and int(state.length_B.max()) == state.k_BSGK.shape[1]
            if full:
                state = Cache(state.k_BSGK[:, 1:], state.v_BSGK[:, 1:])
            return super().forward(x_BTD, state, ctx)


@breaks(chunk="preallocated for")
class OtherStartWhenPreallocated(Mini):
    """init_state does not give the state that a sequence starts from."""

    class Mixer(Memory):
        def init_state(self, batch, capacity, device, dtype, ticks):
            return torch.ones(batch, len(self.decay), device=device, dtype=dtype)

        def scan(self, v_BTD, state, ctx):
            s_BD = torch.zeros_like(v_BTD[:, 0]) if state is None else state
            found = []  # relies on the start being zero instead of resetting at the first token
            for v_BD in v_BTD.unbind(1):
                s_BD = self.decay.sigmoid() * s_BD + v_BD
                found.append(s_BD)
            return torch.stack(found, 1), s_BD


# ------------------------------------------------------------------------------------------------ rows


@breaks(rows="logits moved by .*after changing all other rows")
class BatchForTime(Mini):
    """S6: the fallback scan views (T, B) as (B, T)."""

    class Mixer(Memory):
        def scan(self, v_BTD, state, ctx):
            mixed = v_BTD.transpose(0, 1).reshape(v_BTD.shape)
            return super().scan(mixed, state, ctx)


@breaks(rows="moved by .*rows")
class SharedFastState(Mini):
    """S12: the fast state is shared across the examples of a batch."""

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            y_BTD, after = super().forward(x_BTD, state, ctx)
            return y_BTD, after.mean(0, keepdim=True).expand_as(after)


@breaks(rows="document B")
class NoResetAtDocuments(Mini):
    """D9: a recurrent memory that goes on over the border between packed documents."""

    class Mixer(Memory):
        def scan(self, v_BTD, state, ctx):
            s_BD, found = torch.zeros_like(v_BTD[:, 0]) if state is None else state, []
            for v_BD in v_BTD.unbind(1):
                s_BD = self.decay.sigmoid() * s_BD + v_BD
                found.append(s_BD)
            return torch.stack(found, 1), s_BD


@breaks(rows="document B alone")
class PositionsOfTheRow(Mini):
    """Absolute positions in the row, not in the document: padding on the left moves everything."""

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            begun_B, memory = (torch.zeros_like(ctx.positions_BT[:, 0]), None) if state is None else state
            index_BT = begun_B[:, None] + torch.arange(x_BTD.shape[1])
            y_BTD, memory = super().forward(x_BTD + index_BT[..., None].cos().to(x_BTD), memory, ctx)
            return y_BTD, (begun_B + x_BTD.shape[1], memory)


@breaks(rows=r"a state leaf of shape \(\) has no batch of 5")
class SharedCounter(Mini):
    """One counter for all rows: they cannot be regrouped."""

    class Mixer(Memory):
        def forward(self, x_BTD, state, ctx):
            count, memory = (torch.zeros((), dtype=torch.int64), None) if state is None else state
            y_BTD, memory = super().forward(x_BTD, memory, ctx)
            return y_BTD, (count + x_BTD.shape[1], memory)


@breaks(rows="nll moved.*half of the targets not scored")
class ScoresPadding(Mini):
    """Targets that are not scored count as token 0."""

    class Head(SoftmaxHead):
        def nll(self, h_BTD, targets_BT):
            return super().nll(h_BTD, targets_BT.clamp(min=0))

    def build(self, vocab):
        model = super().build(vocab)
        model.head = self.Head(self.width, vocab)
        return model


@breaks(rows="logits moved by .*row")
class BatchWideStop(Looped):
    """S7, G6: the loop ends when all tokens of the batch would stop, and the last state is the output."""

    class Recurrence(HaltingLoop):
        def forward(self, x_BTD, state, ctx):
            ticks = self.ticks if ctx.ticks is None else ctx.ticks
            h_BTD, after, spent_BT = x_BTD, [], torch.zeros_like(x_BTD[..., 0])
            for tick in range(ticks):
                h_BTD, carried = self.core(self.norm(h_BTD), None if state is None else state[tick], ctx.at_tick(tick))
                after.append(carried)
                spent_BT = spent_BT + (1 - spent_BT) * self.halt(h_BTD)[..., 0].sigmoid()
                if bool((spent_BT > 0.9).all()):
                    break
            ctx.note("ticks", torch.full_like(ctx.positions_BT, tick + 1))
            return h_BTD, tuple(after)
