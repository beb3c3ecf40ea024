"""The state-space backbone with a segment-recurrent memory in its middle."""

from __future__ import annotations

from stepladder.core.config import Field
from stepladder.models.layers import residual_gain
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.memory import SegmentMemory
from stepladder.models.recurrences.once import Once
from stepladder.models.spec import architecture
from stepladder.models.stack import Residual, Stack
from stepladder.models.zoo.ssm import TINY, StateSpace


@architecture("ssm_mem", tiny={**TINY, "heads": 2, "memory": 3, "segment": 4})
class StateSpaceMemory(StateSpace):
    """``ssm`` with memory tokens behind its first half: a segment's tokens read what the segments before it wrote.

    Source: the segment recurrence of Bulatov et al., 2022, "Recurrent Memory Transformer", on the backbone of ``ssm``.
    Differs from it in: memory is written and read by cross-attention in one place, not carried as tokens through
    every layer, and gradients cross segments within a call. Repairs its ancestor (spec "ladder", 1.7), whose memory
    was computed from the whole sequence, future included, and carried nothing from segment to segment.
    """

    heads: int = Field(4, ge=1, description="attention heads of the memory; divides width")
    memory: int = Field(16, ge=1, description="memory tokens M")
    segment: int = Field(64, ge=1, description="tokens between two updates of the memory")

    def build(self, vocab: int) -> LanguageModel:
        blocks = [self.backbone_block() for _ in range(self.depth)]
        memory = SegmentMemory(self.width, self.heads, self.memory, self.segment, residual_gain(self.depth))
        blocks.insert(max(1, self.depth // 2), [Residual(self.width, memory, self.dropout)])
        parts = [part for block in blocks for part in block]
        return LanguageModel(vocab, self.width, Once(Stack(parts)), tied=self.tied)
