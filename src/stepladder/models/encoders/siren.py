"""Sine layers over where a pixel is and how bright it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.core.config import Field
from stepladder.models.encoders.base import Encoder, PatchedSpec, encoder
from stepladder.models.layers import linear, no_autocast


class SirenEncoder(Encoder):
    """phi(x, y, brightness) for every pixel, phi an MLP with sine activations; the mean over a p x p patch is a slot.

    Source: Sitzmann et al., 2020, "Implicit neural representations with periodic activation functions", section 3.2:
    layers sin(omega (W h) + b), W of the first uniform within 1/fan-in, of the others within sqrt(6/fan-in)/omega.
    Differs from it in: the network is not fitted to one image, whose weights would then stand for it; it is an encoder
    of all images, so it takes the pixel's brightness beside its coordinates (the ancestor's took coordinates alone,
    and so gave one and the same output for every image); omega is smaller, as the images are.
    """

    def __init__(self, spec: Siren, width: int) -> None:
        super().__init__(spec, width, placed=False)
        self.patch, self.omega = spec.patch, spec.omega
        sizes = [2 + spec.channels] + [spec.hidden] * spec.layers
        layers = [nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(sizes)]
        for depth, layer in enumerate(layers):
            bound = math.sqrt(6 / layer.in_features) / self.omega if depth else 1 / layer.in_features
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.uniform_(layer.bias, -math.pi, math.pi)
        self.layers = nn.ModuleList(layers)
        self.out = linear(spec.hidden, width, gain=2.0)

    def features(self, pixels_NCYX: Tensor) -> Tensor:
        count, _, side, _ = pixels_NCYX.shape
        with no_autocast(pixels_NCYX.device):  # angles need the precision
            axis = torch.linspace(-1, 1, side, device=pixels_NCYX.device, dtype=pixels_NCYX.dtype)
            where_2YX = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
            x_NCYX = torch.cat((where_2YX.expand(count, -1, -1, -1), pixels_NCYX / 127.5 - 1), 1)
            h_NYXF = x_NCYX.permute(0, 2, 3, 1)
            for layer in self._layers():
                h_NYXF = torch.sin(self.omega * F.linear(h_NYXF, layer.weight) + layer.bias)
            mean_NFYX = F.avg_pool2d(h_NYXF.permute(0, 3, 1, 2), self.patch)
        return self.out(mean_NFYX.flatten(2).transpose(1, 2))

    def _layers(self) -> Iterator[nn.Linear]:
        return cast(Iterator[nn.Linear], iter(self.layers))

    def flops(self) -> float:
        weights = sum(layer.weight.numel() for layer in self._layers())
        return 2.0 * self.spec.side**2 * weights + 2.0 * self.slots * self.out.weight.numel()


@encoder("siren")
class Siren(PatchedSpec):
    """A sine network over coordinates and brightness, averaged over patches."""

    hidden: int = Field(64, ge=1, description="width of the sine layers")
    layers: int = Field(3, ge=1, description="sine layers")
    omega: float = Field(6.0, gt=0, description="frequency of the sines; the paper has 30, for large images")

    def build(self, width: int) -> SirenEncoder:
        return SirenEncoder(self, width)
