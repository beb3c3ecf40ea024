"""The delta-rule backbone: gated DeltaNet in the place of attention, and DeltaNet without the gate."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from stepladder.core.config import Field
from stepladder.models.layers import residual_gain
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.delta import Delta
from stepladder.models.recurrences.once import Once
from stepladder.models.spec import HEADED, Macro, architecture
from stepladder.models.stack import Stack

TINY = {"width": 16, "depth": 2, "heads": 2, "chunk": 8}


@architecture("gated_deltanet", tiny=TINY, aliases=("deltanet",))
class GatedDeltaNet(Macro):
    """Blocks of the gated delta rule and SwiGLU: against ``transformer``, the mixer is the one thing that differs.

    Source: Yang, Kautz & Hatamizadeh, 2025, "Gated delta networks"; ``decay: false`` is DeltaNet (Yang et al., 2024,
    "Parallelizing linear transformers with the delta rule", whose chunked form this is). Differs from it in: one
    width for keys and values; the gate of the output has no convolution; initial scales of this house.
    """

    heads: int = Field(4, ge=1, description="heads of the memory")
    head_width: int | None = Field(None, ge=1, description="width of keys and values of a head; default width / heads")
    conv: int = Field(4, ge=1, description="tokens that the causal convolution sees; 1 sees the token alone")
    decay: bool = Field(True, description="whether the memory forgets by a learned, input-dependent decay")
    scan: Literal["chunked", "naive"] = Field("chunked", description="matrix products over chunks, or the recurrence")
    chunk: int = Field(64, ge=2, description="tokens of a chunk; changes speed and rounding, not the function")

    sizes: ClassVar[dict[str, dict[str, Any]]] = HEADED
    twins: ClassVar[tuple[dict[str, Any], ...]] = ({"scan": "naive"},)

    def build(self, vocab: int) -> LanguageModel:
        gain, head_width = residual_gain(self.depth), self.head_width or max(1, self.width // self.heads)
        mixers = [
            Delta(self.width, self.heads, head_width, self.conv, self.decay, self.scan, self.chunk, gain)
            for _ in range(self.depth)
        ]
        parts = [part for mixer in mixers for part in self.block(mixer, self.depth)]
        return LanguageModel(vocab, self.width, Once(Stack(parts)), tied=self.tied)
