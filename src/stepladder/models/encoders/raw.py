"""Pixels as they are: an embedding for every level of brightness."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepladder.models.encoders.base import Encoder, EncoderSpec, encoder

LEVELS = 256


class RawEncoder(Encoder):
    """One slot a pixel, row by row: the embedding of its level, those of the channels added up, plus its place's.

    The levels start as a straight line through the embedding space with some noise, so that near ones are alike.
    """

    def __init__(self, spec: Raw, width: int) -> None:
        super().__init__(spec, width)
        self.levels = nn.Embedding(spec.channels * LEVELS, width)
        ramp = torch.linspace(-1, 1, LEVELS)[:, None] * torch.randn(spec.channels, 1, width)
        nn.init.normal_(self.levels.weight, std=0.1)
        with torch.no_grad():
            self.levels.weight += ramp.flatten(0, 1)

    def features(self, pixels_NCYX: Tensor) -> Tensor:
        ids_NCP = pixels_NCYX.flatten(2).round().long()
        first_C = LEVELS * torch.arange(ids_NCP.shape[1], device=ids_NCP.device)
        return self.levels(ids_NCP + first_C[:, None]).sum(1)

    def flops(self) -> float:
        return 0.0


@encoder("raw")
class Raw(EncoderSpec):
    """Every pixel a slot: an embedding of its brightness. Long: a side of 28 takes 784 positions."""

    @property
    def slots(self) -> int:
        """The pixels of an image."""
        return self.side**2

    def build(self, width: int) -> RawEncoder:
        return RawEncoder(self, width)
