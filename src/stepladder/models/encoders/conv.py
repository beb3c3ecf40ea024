"""Three convolutions that halve an image twice."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stepladder.core.config import Field
from stepladder.models.encoders.base import Encoder, EncoderSpec, conv, conv_flops, encoder
from stepladder.models.layers import linear


class ConvEncoder(Encoder):
    """3x3 convolutions C -> F/2, F/2 -> F, F -> F with strides 1, 2, 2 and rectifiers, then a linear map to D."""

    def __init__(self, spec: Conv, width: int) -> None:
        super().__init__(spec, width)
        half = max(1, spec.hidden // 2)
        self.first = conv(spec.channels, half, 3, 1, 1)
        self.second = conv(half, spec.hidden, 3, 2, 1)
        self.third = conv(spec.hidden, spec.hidden, 3, 2, 1)
        self.out = linear(spec.hidden, width)
        self.sides = (spec.side, -(-spec.side // 2), spec.grid)

    def features(self, pixels_NCYX: Tensor) -> Tensor:
        x = self.unit(pixels_NCYX)
        for layer in (self.first, self.second, self.third):
            x = F.relu(layer(x))
        return self.out(x.flatten(2).transpose(1, 2))

    def flops(self) -> float:
        layers = zip((self.first, self.second, self.third), self.sides, strict=True)
        return sum(conv_flops(layer, side**2) for layer, side in layers) + 2.0 * self.slots * self.out.weight.numel()


@encoder("conv")
class Conv(EncoderSpec):
    """A small convolutional network; a slot for every 4x4 pixels."""

    hidden: int = Field(64, ge=2, description="channels of the last two convolutions")

    @property
    def grid(self) -> int:
        """Rows and columns of slots."""
        return -(-self.side // 4)

    @property
    def slots(self) -> int:
        """The places of the last convolution."""
        return self.grid**2

    def build(self, width: int) -> ConvEncoder:
        return ConvEncoder(self, width)
