"""Gated recurrent units in the place of attention: the control of planners whose executor is a GRU."""

from __future__ import annotations

from typing import Any, ClassVar

from stepladder.core.config import Field
from stepladder.models.layers import residual_gain
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.gru import GRU, units_like_attention
from stepladder.models.mixers.lstm import Scan
from stepladder.models.recurrences.once import Once
from stepladder.models.spec import Macro, architecture
from stepladder.models.stack import Stack


@architecture("gru", tiny={"width": 16, "depth": 2, "inner": 12})
class GatedRecurrentUnits(Macro):
    """Blocks of a GRU and SwiGLU: against ``transformer``, the mixer is the one thing that differs.

    Source: Cho et al., 2014, "Learning phrase representations using RNN encoder-decoder", with the reset gate behind
    the recurrent product, as in torch. Differs from it in: one layer a block, inside pre-norm residuals; a linear map
    of h on the way out; initial scales of this house.
    """

    inner: int | None = Field(
        None, ge=1, description="units; default: as many as give the mixer the parameters of attention"
    )
    scan: Scan = Field("fused", description="hand-written passes over all tokens, or the plain loop under autograd")

    twins: ClassVar[tuple[dict[str, Any], ...]] = ({"scan": "naive"},)

    def build(self, vocab: int) -> LanguageModel:
        gain, inner = residual_gain(self.depth), self.inner or units_like_attention(self.width)
        mixers = [GRU(self.width, inner, self.scan, gain) for _ in range(self.depth)]
        parts = [part for mixer in mixers for part in self.block(mixer, self.depth)]
        return LanguageModel(vocab, self.width, Once(Stack(parts)), tied=self.tied)
