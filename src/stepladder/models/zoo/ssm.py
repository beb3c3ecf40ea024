"""The state-space backbone: Mamba-2 in the place of attention."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from stepladder.core.config import Field
from stepladder.models.layers import residual_gain
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.mamba2 import Mamba2
from stepladder.models.recurrences.once import Once
from stepladder.models.spec import Macro, architecture
from stepladder.models.stack import Residual, Stack

TINY = {"width": 16, "depth": 2, "head_width": 8, "state": 4, "chunk": 8}


@architecture("ssm", tiny=TINY, aliases=("mamba2",))
class StateSpace(Macro):
    """Blocks of Mamba-2 and SwiGLU: against ``transformer``, the mixer is the one thing that differs.

    Source: Dao & Gu, 2024, "Transformers are SSMs" (SSD, sections 6 and 7). Differs from it in: a SwiGLU after every
    mixer, where the paper stacks mixers alone; no bias in the convolution; one norm over all heads, not one a group;
    initial scales of this house. Repairs its ancestor (spec "ladder", 1.6), whose scan never multiplied its input in,
    mixed time with batch, and cached another function than it trained.
    """

    expand: int = Field(2, ge=1, description="inner width of the mixer as a multiple of the model width")
    head_width: int = Field(64, ge=1, description="channels P of a head; divides expand x width")
    groups: int = Field(1, ge=1, description="groups of heads that share B and C; divides the heads")
    state: int = Field(64, ge=1, description="state size N of a channel")
    conv: int = Field(4, ge=1, description="tokens that the causal convolution sees; 1 sees the token alone")
    scan: Literal["chunked", "naive"] = Field("chunked", description="matrix products over chunks, or the recurrence")
    chunk: int = Field(64, ge=2, description="tokens of a chunk; changes speed and rounding, not the function")

    twins: ClassVar[tuple[dict[str, Any], ...]] = ({"scan": "naive"},)

    def backbone_block(self) -> list[Residual]:
        """One block of Mamba-2 and SwiGLU."""
        mixer = Mamba2(
            self.width,
            self.expand * self.width,
            self.head_width,
            self.groups,
            self.state,
            self.conv,
            self.scan,
            self.chunk,
            residual_gain(self.depth),
        )
        return self.block(mixer, self.depth)

    def build(self, vocab: int) -> LanguageModel:
        parts = [part for _ in range(self.depth) for part in self.backbone_block()]
        return LanguageModel(vocab, self.width, Once(Stack(parts)), tied=self.tied)
