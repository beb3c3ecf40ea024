"""Nested learning: a continuum memory in the place of the feed-forward layer; behind attention, behind memories."""

from __future__ import annotations

from typing import Any, ClassVar

from stepladder.core.config import Field
from stepladder.models.base import Part
from stepladder.models.channels.cms import ContinuumMemory, Levels, Rule
from stepladder.models.layers import residual_gain
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.attention import Attention
from stepladder.models.mixers.selfmod import Memories, SelfModifying
from stepladder.models.recurrences.once import Once
from stepladder.models.spec import HEADED, AttentionMacro, Macro, architecture
from stepladder.models.stack import Residual, Stack

TINY = {"width": 16, "depth": 2, "heads": 2, "levels": 2}


class Chained(Macro):
    """Macro with a chain of levels in the place of SwiGLU. ``hidden`` is the hidden width of one level."""

    levels: int = Field(3, ge=1, description="levels of the continuum memory, from fast to slow")

    def level_width(self, teach: bool) -> int:
        """Hidden width of a level; by default the chain, with its teacher, has the parameters of SwiGLU."""
        swiglu = 3 * max(8, round(self.width * 8 / 3 / 8) * 8)
        return self.hidden or max(1, round((swiglu - (self.width if teach else 0)) / (2 * self.levels)))

    def mixer(self) -> Part:
        """The mixer of one block."""
        raise NotImplementedError

    def channel(self) -> Part:
        """What stands in the place of SwiGLU."""
        raise NotImplementedError

    @property
    def learned_positions(self) -> int:
        """Rows of the learned position table."""
        return 0

    def build(self, vocab: int) -> LanguageModel:
        parts = [
            Residual(self.width, part, self.dropout)
            for _ in range(self.depth)
            for part in (self.mixer(), self.channel())
        ]
        core = Once(Stack(parts))
        return LanguageModel(vocab, self.width, core, tied=self.tied, learned_positions=self.learned_positions)


class Learning(Chained):
    """Chained, with levels that learn."""

    level_chunk: int = Field(64, ge=1, description="period of the fastest level in tokens; part of the function")
    factor: int = Field(4, ge=1, description="period of a level as a multiple of that of the one before")
    rule: Rule = Field("sgd", description="what a level does with its gradient")
    level_rate: float = Field(0.3, gt=0, description="initial inner step of all levels")
    bound: float = Field(4.0, gt=0, description="root mean square from which inner errors are scaled down")
    horizon: int = Field(
        0, ge=0, description="chunks of a document after which gradients through writes stop; 0 = never"
    )

    def channel(self) -> Part:
        levels = Levels(
            self.width,
            self.level_width(teach=True),
            self.levels,
            self.level_chunk,
            self.factor,
            self.rule,
            self.level_rate,
            self.bound,
            self.horizon,
            residual_gain(self.depth),
        )
        return ContinuumMemory(self.width, levels, learn=True)


class Attended(Chained, AttentionMacro):
    """Chained, with attention as the mixer."""

    sizes: ClassVar[dict[str, dict[str, Any]]] = AttentionMacro.sizes

    def mixer(self) -> Part:
        base = self.rope_base if self.positions == "rope" else None
        return Attention(self.width, self.heads, self.kv_heads or self.heads, base, residual_gain(self.depth))

    @property
    def learned_positions(self) -> int:
        return self.max_positions if self.positions == "learned" else 0


@architecture("hope_attention", tiny=TINY | {"level_chunk": 8, "factor": 2})
class HopeAttention(Learning, Attended):
    """Blocks of attention and a continuum memory: MLPs that learn at test time, each at its own pace.

    Source: Behrouz et al., 2025, "Nested learning" (Hope-Attention; continuum memory system, eqs. 70-74, sequential
    form). models.channels.cms has the equations. Differs from it in: the teach signal is local, the chain's own
    prediction of its next input, where the paper takes the gradient of the task's loss (that one hangs on the whole
    network, so that every update would wait for a forward of all layers); gradients are means over a period, divided by
    a layer's inputs, and bounded; rates are learned, one a level; the outer gradient goes through the writes.
    """


@architecture("cms_transformer", tiny=TINY)
class CMSTransformer(Attended):
    """The control of ``hope_attention``: the same chain of MLPs, never written.

    What is left of a difference is what learning at test time brings, not what a chain of small MLPs does. This is the
    continuum memory at an update frequency of 0 in all levels ("Nested learning", section 7.1). Differs from it in:
    nothing else.
    """

    def channel(self) -> Part:
        width = self.level_width(teach=False)
        levels = Levels(self.width, width, self.levels, 1, 1, "sgd", 1.0, 1.0, 0, residual_gain(self.depth))
        return ContinuumMemory(self.width, levels, learn=False)


@architecture("hope_selfmod", tiny=TINY | {"level_chunk": 8, "factor": 2, "chunk": 8}, aliases=("hope",))
class HopeSelfmod(Learning):
    """Blocks of self-modifying memories and a continuum memory.

    Source: Behrouz et al., 2025, "Nested learning" (HOPE; self-modifying Titans, eqs. 83-97). models.mixers.selfmod has
    the equations, and what ``hope_attention`` lists holds here too. Differs from it in: memories in heads; one chunk
    size for all five; rates and retentions are one number a head, bounded; delta gradient descent on the layer that
    hears the key, scalar retention on the other (the paper leaves its key undefined), and its term too is taken at the
    chunk's start, where the paper multiplies from token to token; no momentum; norms and a gate around the mixer.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = HEADED

    heads: int = Field(4, ge=1, description="heads; divides width")
    memory_expand: int = Field(1, ge=1, description="hidden width of a memory network in head widths")
    conv: int = Field(4, ge=1, description="tokens that the causal convolution sees; 1 sees the token alone")
    rate: float = Field(0.3, gt=0, description="largest inner step eta of the memories")
    chunk: int = Field(16, ge=1, description="tokens whose writes the memories make at one state; part of the function")

    def mixer(self) -> Part:
        head_width = max(1, self.width // self.heads)
        memories = Memories(
            self.heads,
            head_width,
            expand=self.memory_expand,
            rate=self.rate,
            bound=self.bound,
            horizon=self.horizon,
            chunk=self.chunk,
        )
        return SelfModifying(self.width, head_width, memories, self.conv, residual_gain(self.depth))
