"""The neural Turing machine in the place of attention."""

from __future__ import annotations

from typing import Any, ClassVar

from stepladder.core.config import Field
from stepladder.models.layers import residual_gain
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.lstm import Scan, cells_like_attention
from stepladder.models.mixers.ntm import NTM, told_sizes
from stepladder.models.recurrences.once import Once
from stepladder.models.spec import Macro, architecture
from stepladder.models.stack import Stack

TINY = {
    "width": 16,
    "depth": 2,
    "inner": 10,
    "slots": 6,
    "slot_width": 5,
    "read_heads": 2,
    "write_heads": 2,
    "chunk": 8,
}


@architecture("ntm", tiny=TINY)
class NeuralTuringMachine(Macro):
    """Blocks of a neural Turing machine and SwiGLU: against ``transformer``, the mixer is the one thing that differs.

    Source: Graves, Wayne & Danihelka, 2014, "Neural Turing machines", with a controller that is an LSTM. Differs
    from it in: what is added to a slot goes through tanh, so that slots stay bounded; norms and sharpening are safe
    at 0 (models.addressing); the controller's h, c and first reads start at 0, memory and weights at learned values;
    initial scales of this house. Repairs its ancestor (spec "vectur", 3.3), whose controller never heard what was
    read.
    """

    inner: int | None = Field(
        None,
        ge=1,
        description="cells of the controller; default: as many as give the mixer the parameters of attention",
    )
    slots: int = Field(64, ge=3, description="slots N of the memory")
    slot_width: int = Field(32, ge=1, description="numbers M that a slot holds")
    read_heads: int = Field(2, ge=1, description="heads that read")
    write_heads: int = Field(1, ge=1, description="heads that erase and add")
    shift: int = Field(1, ge=1, description="slots that a head can move by at a token, either way")
    scan: Scan = Field("fused", description="hand-written passes over all tokens, or the plain loop under autograd")
    chunk: int = Field(
        32, ge=1, description="tokens between kept copies of the memory; changes speed, not the function"
    )

    twins: ClassVar[tuple[dict[str, Any], ...]] = ({"scan": "naive"},)

    def build(self, vocab: int) -> LanguageModel:
        parts = [part for _ in range(self.depth) for part in self.block(self._mixer(), self.depth)]
        return LanguageModel(vocab, self.width, Once(Stack(parts)), tied=self.tied)

    def _mixer(self) -> NTM:
        told, read = (
            sum(told_sizes(self.read_heads, self.write_heads, self.shift, self.slot_width)),
            self.read_heads * self.slot_width,
        )
        return NTM(
            self.width,
            self.inner or cells_like_attention(self.width, read, told),
            slots=self.slots,
            slot_width=self.slot_width,
            reads=self.read_heads,
            writes=self.write_heads,
            shift=self.shift,
            scan=self.scan,
            chunk=self.chunk,
            gain=residual_gain(self.depth),
        )
