"""Square patches through one linear map."""

from __future__ import annotations

import math

from pydantic import model_validator
from torch import Tensor, nn

from stepladder.core.config import Field
from stepladder.models.encoders.base import Encoder, EncoderSpec, encoder
from stepladder.models.layers import linear


class PatchEncoder(Encoder):
    """Patches of p x p pixels, flattened, through one linear map (Dosovitskiy et al., 2021, equation 1)."""

    def __init__(self, spec: Patch, width: int) -> None:
        super().__init__(spec, width)
        self.cut = nn.PixelUnshuffle(spec.patch)
        self.out = linear(spec.channels * spec.patch**2, width)

    def features(self, pixels_NCYX: Tensor) -> Tensor:
        return self.out(self.cut(self.unit(pixels_NCYX)).flatten(2).transpose(1, 2))

    def flops(self) -> float:
        return 2.0 * self.slots * self.out.weight.numel()


@encoder("patch")
class Patch(EncoderSpec):
    """A linear map of every square patch, as in the Vision Transformer."""

    patch: int = Field(4, ge=1, description="side of a patch in pixels; divides side")

    @model_validator(mode="after")
    def _divides(self) -> Patch:
        if self.side % self.patch:
            near = math.gcd(self.side, self.patch)
            raise ValueError(f"patch = {self.patch} does not divide side = {self.side}; patch = {near} does")
        return self

    @property
    def slots(self) -> int:
        """The patches of an image."""
        return (self.side // self.patch) ** 2

    def build(self, width: int) -> PatchEncoder:
        return PatchEncoder(self, width)
