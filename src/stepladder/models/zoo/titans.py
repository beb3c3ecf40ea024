"""Titans: neural memories that are trained while they are read."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from stepladder.core.config import Field
from stepladder.models.base import Part
from stepladder.models.layers import residual_gain
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.context import MemoryAsContext
from stepladder.models.mixers.join import Chain, Gated
from stepladder.models.mixers.neural_memory import FastMemory
from stepladder.models.mixers.titans import NeuralMemory
from stepladder.models.mixers.window import WindowAttention
from stepladder.models.recurrences.once import Once
from stepladder.models.spec import HEADED, Macro, architecture
from stepladder.models.stack import Stack

TINY = {"width": 16, "depth": 2, "heads": 2, "chunk": 16}


class Remembering(Macro):
    """Macro with the fields of a neural memory."""

    heads: int = Field(4, ge=1, description="heads; divides width")
    memory_layers: int = Field(2, ge=1, le=4, description="layers of a head's memory network; 1 = a matrix")
    memory_expand: int = Field(2, ge=1, description="hidden width of the memory network in head widths")
    conv: int = Field(4, ge=1, description="tokens that the causal convolution sees; 1 sees the token alone")
    rate: float = Field(0.25, gt=0, description="largest inner step theta")
    momentum: bool = Field(True, description="whether past surprise is carried (eta)")
    forget: bool = Field(True, description="whether the memory forgets (alpha)")
    bound: float = Field(4.0, gt=0, description="root mean square from which inner errors are scaled down")
    horizon: int = Field(
        0, ge=0, description="chunks of a document after which gradients through writes stop; 0 = never"
    )
    chunk: int = Field(
        32, ge=1, description="tokens whose inner gradients are taken at one memory; part of the function"
    )

    sizes: ClassVar[dict[str, dict[str, Any]]] = HEADED

    def fast_memory(self, scan: Literal["chunked", "naive"] = "chunked") -> FastMemory:
        """The memories of one block."""
        return FastMemory(
            self.width,
            self.heads,
            max(1, self.width // self.heads),
            layers=self.memory_layers,
            expand=self.memory_expand,
            rate=self.rate,
            momentum=self.momentum,
            forget=self.forget,
            bound=self.bound,
            horizon=self.horizon,
            scan=scan,
            chunk=self.chunk,
        )

    def mixer(self) -> Part:
        """The mixer of one block."""
        raise NotImplementedError

    def build(self, vocab: int) -> LanguageModel:
        parts = [part for _ in range(self.depth) for part in self.block(self.mixer(), self.depth)]
        return LanguageModel(vocab, self.width, Once(Stack(parts)), tied=self.tied)


class Mixing(Remembering):
    """Remembering, where the memory is a mixer of its own."""

    scan: Literal["chunked", "naive"] = Field("chunked", description="matrix products over chunks, or token by token")

    twins: ClassVar[tuple[dict[str, Any], ...]] = ({"scan": "naive"},)

    def memory(self, gain: float) -> NeuralMemory:
        """The memory of one block as a mixer; ``gain`` scales its initial output map."""
        return NeuralMemory(self.width, self.fast_memory(self.scan), self.conv, gain)


class Attending(Mixing):
    """Mixing, with attention in a window beside the memory."""

    window: int = Field(64, ge=1, description="tokens that attention sees")
    persistent: int = Field(4, ge=0, description="learned tokens that attention sees everywhere")
    rope_base: float = Field(10000.0, gt=1, description="base of the rotary frequencies of attention")

    def attention(self, gain: float) -> WindowAttention:
        """Attention in a window."""
        return WindowAttention(self.width, self.heads, self.window, self.persistent, self.rope_base, gain)


@architecture("titans_lmm", tiny=TINY, aliases=("titans",))
class TitansLMM(Mixing):
    """Blocks of a neural memory and SwiGLU: against ``transformer``, the mixer is the one thing that differs.

    Source: Behrouz, Zhong & Mirrokni, 2025, "Titans: learning to memorize at test time" (LMM: the memory alone), with
    the residual memory network of "Nested learning", 2025, eq. 91. Differs from them in: the inner loss is halved, its
    gradient bounded; silu in the memory network; memories in heads; chunks are counted from a document's first token
    and gradients taken at their start, reads see the writes up to their own token (the paper's recurrence with stale
    gradients); no persistent tokens, which before a memory alone are another learned M_0; initial scales of this house.
    """

    def mixer(self) -> Part:
        return self.memory(residual_gain(self.depth))


@architecture("titans_mag", tiny=TINY | {"window": 8, "persistent": 2})
class TitansMAG(Attending):
    """Blocks of window attention gated by a neural memory, and SwiGLU.

    Source: Titans, section 4.2 (memory as gate). Differs from it in: what ``titans_lmm`` lists; persistent tokens are
    keys and values of attention alone.
    """

    def mixer(self) -> Part:
        return Gated(self.width, self.attention(1.0), self.memory(1.0), residual_gain(self.depth))


@architecture("titans_mal", tiny=TINY | {"window": 8, "persistent": 2})
class TitansMAL(Attending):
    """Blocks of a neural memory with window attention behind it, and SwiGLU.

    Source: Titans, section 4.3 (memory as layer). Differs from it in: what ``titans_lmm`` lists; a norm between the
    two; persistent tokens are keys and values of attention alone.
    """

    def mixer(self) -> Part:
        return Chain(self.width, self.memory(1.0), self.attention(residual_gain(self.depth)))


@architecture("titans_mac", tiny=TINY | {"persistent": 2})
class TitansMAC(Remembering):
    """Blocks of attention over segments and what a neural memory says about them, and SwiGLU.

    Source: Titans, section 4.1 (memory as context); models.mixers.context has the equations. Differs from it in: what
    ``titans_lmm`` lists; segments are the memory's chunks and counted from a document's first token; an output hears
    the memory after the write of its own token, there after that of the whole segment, future tokens included; the
    memory is told the normed output of attention.
    """

    persistent: int = Field(4, ge=0, description="learned tokens that attention sees everywhere")
    rope_base: float = Field(10000.0, gt=1, description="base of the rotary frequencies of attention")

    def mixer(self) -> Part:
        gain = residual_gain(self.depth)
        return MemoryAsContext(self.width, self.fast_memory(), self.conv, self.persistent, self.rope_base, gain)
