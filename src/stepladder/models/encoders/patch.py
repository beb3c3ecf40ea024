"""Square patches through one linear map."""

from __future__ import annotations

from torch import Tensor, nn

from stepladder.models.encoders.base import Encoder, PatchedSpec, encoder
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
class Patch(PatchedSpec):
    """A linear map of every square patch, as in the Vision Transformer."""

    def build(self, width: int) -> PatchEncoder:
        return PatchEncoder(self, width)
