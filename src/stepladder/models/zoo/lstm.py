"""The oldest memory: an LSTM in the place of attention."""

from __future__ import annotations

from typing import Any, ClassVar

from stepladder.core.config import Field
from stepladder.models.layers import residual_gain
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.lstm import LSTM, Scan, cells_like_attention
from stepladder.models.recurrences.once import Once
from stepladder.models.spec import Macro, architecture
from stepladder.models.stack import Stack


@architecture("lstm", tiny={"width": 16, "depth": 2, "inner": 12})
class LongShortTermMemory(Macro):
    """Blocks of an LSTM and SwiGLU: against ``transformer``, the mixer is the one thing that differs.

    Source: Hochreiter & Schmidhuber, 1997, "Long short-term memory", with the forget gates of Gers et al., 2000,
    "Learning to forget". Differs from them in: no peepholes; one layer a block, inside pre-norm residuals; a linear map
    of h on the way out; initial scales of this house (forget gates start at bias 1). Repairs its ancestor (spec
    "vectur", 1.6 and 1.7), whose hidden size was blown up to meet the parameters of another block at a depth of 1, and
    whose recomputed gradients were those of other layers.
    """

    inner: int | None = Field(
        None, ge=1, description="cells; default: as many as give the mixer the parameters of attention"
    )
    scan: Scan = Field("fused", description="hand-written passes over all tokens, or the plain loop under autograd")

    twins: ClassVar[tuple[dict[str, Any], ...]] = ({"scan": "naive"},)

    def build(self, vocab: int) -> LanguageModel:
        gain = residual_gain(self.depth)
        inner = self.inner or cells_like_attention(self.width)
        mixers = [LSTM(self.width, inner, self.scan, gain) for _ in range(self.depth)]
        parts = [part for mixer in mixers for part in self.block(mixer, self.depth)]
        return LanguageModel(vocab, self.width, Once(Stack(parts)), tied=self.tied)
