"""A Haar wavelet transform on one grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from stepladder.core.config import Field
from stepladder.models.encoders.base import Encoder, EncoderSpec, encoder
from stepladder.models.layers import linear


def haar(x_NCYX: Tensor) -> tuple[Tensor, Tensor]:
    """One level of the orthonormal 2-D Haar transform (Mallat, 1989): the approximation (N, C, Y/2, X/2) and the
    three details (N, 3C, Y/2, X/2): differences along the columns, along the rows, and of both."""
    a, b = x_NCYX[..., ::2, ::2], x_NCYX[..., ::2, 1::2]
    c, d = x_NCYX[..., 1::2, ::2], x_NCYX[..., 1::2, 1::2]
    return (a + b + c + d) / 2, torch.cat(((a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2), 1)


class WaveletEncoder(Encoder):
    """The 1 + 3 x levels maps of a Haar transform, each resized to the grid, stacked, through one linear map.

    The transform is fixed; the map, the places and the norm are learned.
    """

    def __init__(self, spec: Wavelet, width: int) -> None:
        super().__init__(spec, width)
        self.levels, self.grid = spec.levels, spec.grid
        self.out = linear(spec.channels * (1 + 3 * spec.levels), width)

    def features(self, pixels_NCYX: Tensor) -> Tensor:
        rest, maps = self.unit(pixels_NCYX), []
        for level in range(1, self.levels + 1):
            rest, details = haar(rest)
            # An approximation of level l has 2^l times the scale of the pixels; so all maps get the scale of pixels.
            maps.append(self._resized(details / 2**level))
        maps.append(self._resized(rest / 2**self.levels))
        return self.out(torch.cat(maps, 1).flatten(2).transpose(1, 2))

    def _resized(self, map_NCYX: Tensor) -> Tensor:
        return F.interpolate(map_NCYX, size=(self.grid, self.grid), mode="bilinear", align_corners=False)

    def flops(self) -> float:
        return 2.0 * self.slots * self.out.weight.numel()


@encoder("wavelet")
class Wavelet(EncoderSpec):
    """The maps of a Haar wavelet transform, all resized to one grid."""

    levels: int = Field(2, ge=1, le=8, description="levels of the transform; 2^levels divides side")
    grid: int = Field(8, ge=1, description="rows and columns of slots")

    @model_validator(mode="after")
    def _divides(self) -> Wavelet:
        if self.side % 2**self.levels:
            raise ValueError(f"levels = {self.levels} need a side that {2**self.levels} divides, not {self.side}")
        return self

    @property
    def slots(self) -> int:
        """The places of the grid."""
        return self.grid**2

    def build(self, width: int) -> WaveletEncoder:
        return WaveletEncoder(self, width)
