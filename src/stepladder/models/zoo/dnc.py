"""The differentiable neural computer in the place of attention."""

from __future__ import annotations

from typing import Any, ClassVar

from stepladder.core.config import Field
from stepladder.models.kernels.dnc_forms import told_sizes
from stepladder.models.layers import residual_gain
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.dnc import DNC
from stepladder.models.mixers.lstm import Scan, cells_like_attention
from stepladder.models.recurrences.once import Once
from stepladder.models.spec import Macro, architecture
from stepladder.models.stack import Stack

TINY = {"width": 16, "depth": 2, "inner": 10, "slots": 6, "slot_width": 5, "read_heads": 2, "chunk": 8}


@architecture("dnc", tiny=TINY)
class DifferentiableNeuralComputer(Macro):
    """Blocks of a differentiable neural computer and SwiGLU: against ``transformer``, the mixer alone differs.

    Source: Graves et al., 2016, "Hybrid computing using a neural network with dynamic external memory". Differs from it
    in: the memory starts at learned values, different for every slot, so that no two slots are used equally by accident
    (the order of equally used slots is arbitrary, and hangs on rounding); norms are safe at 0 (models.addressing); the
    heads are told by a map of h with a bias; one LSTM layer, no skip connections; initial scales of this house. The
    ancestor (spec "vectur", 3.3) called its neural Turing machine by this name.
    """

    inner: int | None = Field(
        None,
        ge=1,
        description="cells of the controller; default: as many as give the mixer the parameters of attention",
    )
    slots: int = Field(64, ge=1, description="slots N of the memory; links between them take N x N numbers a sequence")
    slot_width: int = Field(32, ge=1, description="numbers M that a slot holds")
    read_heads: int = Field(2, ge=1, description="heads that read")
    scan: Scan = Field("fused", description="hand-written passes over all tokens, or the plain loop under autograd")
    chunk: int = Field(16, ge=1, description="tokens between kept copies of memory and links; not part of the function")

    twins: ClassVar[tuple[dict[str, Any], ...]] = ({"scan": "naive"},)

    def build(self, vocab: int) -> LanguageModel:
        parts = [part for _ in range(self.depth) for part in self.block(self._mixer(), self.depth)]
        return LanguageModel(vocab, self.width, Once(Stack(parts)), tied=self.tied)

    def _mixer(self) -> DNC:
        told, read = sum(told_sizes(self.read_heads, self.slot_width)), self.read_heads * self.slot_width
        return DNC(
            self.width,
            self.inner or cells_like_attention(self.width, read, told),
            slots=self.slots,
            slot_width=self.slot_width,
            reads=self.read_heads,
            scan=self.scan,
            chunk=self.chunk,
            gain=residual_gain(self.depth),
        )
