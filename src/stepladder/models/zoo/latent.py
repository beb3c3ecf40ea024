"""The thought stream at a fixed number of ticks."""

from __future__ import annotations

from stepladder.core.config import Field
from stepladder.models.halting import Fixed, Halting
from stepladder.models.layers import residual_gain
from stepladder.models.lm import LanguageModel
from stepladder.models.recurrences.thought import Thought
from stepladder.models.spec import AttentionMacro, architecture
from stepladder.models.stack import Stack

TINY = {"width": 16, "depth": 2, "heads": 2, "thoughts": 2, "chunk": 3, "ticks": 3}


@architecture("latent", tiny=TINY)
class Latent(AttentionMacro):
    """A transformer with a stream of latent thoughts about the chunks of its past, read in the middle of the stack.

    ceil(depth/2) blocks, the thought part (recurrences.thought.Thought), the remaining blocks. Source: the dual
    stream of the ablation-ladder ancestor; latent tokens that attend to an input over and over with one set of
    weights are those of Perceiver (Jaegle et al., 2021) and of Universal Transformers (Dehghani et al., 2019).
    Differs from the ancestor in: thoughts see only what is past (there they read the whole teacher-forced sequence,
    answers included, and were added to every position, so the loss could be lowered by reading the future); tokens
    read the Z thoughts by attention, in the middle of the stack, through a gate that starts at 0 (there their mean
    was one vector for all positions after the last layer, which no layer could use); the event's own hidden state
    is heard again at every tick, and the carried thought is normed there, so that ticks may be raised at test time;
    thoughts are told positions as the blocks are.
    """

    thoughts: int = Field(4, ge=1, description="thought tokens of one event")
    chunk: int = Field(4, ge=1, description="tokens of a document from one thought to the next; 1 = at every token")
    ticks: int = Field(4, ge=1, description="applications of the shared thought core")
    inject: bool = Field(True, description="whether thoughts hear their token's hidden state again at every tick")

    def halting(self) -> Halting:
        """When a thought stops: here, after all ticks."""
        return Fixed()

    def build(self, vocab: int) -> LanguageModel:
        blocks = [self.attention_block(self.depth) for _ in range(self.depth)]
        middle = -(-self.depth // 2)
        prelude, coda = (Stack(part for block in half for part in block) for half in (blocks[:middle], blocks[middle:]))
        thought = Thought(
            self.width,
            self.heads,
            self.kv_heads or self.heads,
            self.hidden_width,
            thoughts=self.thoughts,
            chunk=self.chunk,
            ticks=self.ticks,
            halting=self.halting(),
            inject=self.inject,
            rope_base=self.rope_base if self.positions == "rope" else None,
            dropout=self.dropout,
            gain=residual_gain(self.depth),
        )
        return LanguageModel(
            vocab,
            self.width,
            thought,
            prelude=prelude,
            coda=coda,
            tied=self.tied,
            learned_positions=self.learned_positions,
        )
