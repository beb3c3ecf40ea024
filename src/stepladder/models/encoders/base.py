"""What an image encoder is: a module inside the language model, so trained, counted and saved with it.

Shape suffixes: B batch, T tokens, I images of a row, N images, C colour channels, Y X rows and columns of an image, S
slots (embeddings of an image), D model width.

Causality: an image is input as a whole at its first slot, so each of its embeddings may depend on all of its pixels.
What stands before the first slot sees none of them, and no token ever reaches an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from pydantic import model_validator
from torch import Tensor, nn

from stepladder.core.config import Field, Kinded, register
from stepladder.core.registry import Registry
from stepladder.models.base import Cost, Images
from stepladder.models.layers import norm

E = TypeVar("E", bound="type[EncoderSpec]")


class Encoder(nn.Module):
    """Base of the encoders: a subclass writes ``features``; positions in the image and the unit scale are added here.

    width: of the language model. slots: embeddings of an image. placed: whether every slot has a learned embedding of
    its place in the image, for encoders whose features do not tell it.
    """

    slots: int

    def __init__(self, spec: EncoderSpec, width: int, *, placed: bool = True) -> None:
        super().__init__()
        self.spec, self.slots = spec, spec.slots
        self.places = nn.Embedding(self.slots, width) if placed else None
        if self.places is not None:
            nn.init.normal_(self.places.weight, std=0.5)
        self.norm = norm(width)

    def features(self, pixels_NCYX: Tensor) -> Tensor:
        """Features (N, S, D) of images whose pixels go from 0 to 255, in the type of the weights."""
        raise NotImplementedError

    def flops(self) -> float:
        """FLOPs of the matrix products of one image's features."""
        raise NotImplementedError

    def forward(self, pixels_NCYX: Tensor) -> Tensor:
        """Embeddings (N, S, D) of images, uint8 (N, C, Y, X), of unit scale as those of tokens are."""
        side, channels = self.spec.side, self.spec.channels
        if pixels_NCYX.shape[1:] != (channels, side, side):
            shape = tuple(pixels_NCYX.shape[1:])
            raise ValueError(f"images have shape {shape}, the encoder is one for ({channels}, {side}, {side})")
        x_NSD = self.features(pixels_NCYX.to(self.norm.weight.dtype))
        x_NSD = x_NSD.to(self.norm.weight.dtype)  # under mixed precision, the embeddings of tokens are wide, too
        return self.norm(x_NSD if self.places is None else x_NSD + self.places.weight)

    def place(self, images: Images) -> tuple[Tensor, Tensor]:
        """Where images stand, a mask (B, T), and the embeddings (B, T, D) there; what is elsewhere means nothing."""
        batch, count = images.pixels_BICYX.shape[:2]
        slots_BND = self(images.pixels_BICYX.flatten(0, 1)).view(batch, count * self.slots, -1)
        index_BTD = images.slots_BT.clamp(min=0)[:, :, None].expand(-1, -1, slots_BND.shape[-1])
        return images.slots_BT >= 0, slots_BND.gather(1, index_BTD)

    def unit(self, pixels_NCYX: Tensor) -> Tensor:
        """Pixels with the mean and the scale of the specification taken out."""
        return (pixels_NCYX / 255 - self.spec.mean) / self.spec.std

    def cost(self) -> Cost:
        """Parameters, and the FLOPs of one image in place of those of a token."""
        return Cost(sum(p.numel() for p in self.parameters()), self.flops())


class EncoderSpec(Kinded):
    """Base of every encoder's configuration: the images it takes, and ``build``."""

    side: int = Field(28, ge=1, le=1024, description="rows and columns of an image, in pixels; others are resized")
    channels: int = Field(1, ge=1, le=3, description="colour channels: 1 = grey, 3 = RGB")
    mean: float = Field(0.1307, description="mean of pixels in 0..1, taken out; the default is MNIST's")
    std: float = Field(0.3081, gt=0, description="standard deviation of pixels in 0..1; the default is MNIST's")

    @property
    def slots(self) -> int:
        """Positions that an image takes."""
        raise NotImplementedError

    def build(self, width: int) -> Encoder:
        """A freshly initialised encoder into ``width``; weights come from torch's global generator."""
        raise NotImplementedError


class PatchedSpec(EncoderSpec):
    """Fields of an encoder whose slots are square patches."""

    patch: int = Field(4, ge=1, description="side of a patch in pixels; divides side; 1 = a slot for every pixel")

    @model_validator(mode="after")
    def _divides(self) -> PatchedSpec:
        if self.side % self.patch:
            near = math.gcd(self.side, self.patch)
            raise ValueError(f"patch = {self.patch} does not divide side = {self.side}; patch = {near} does")
        return self

    @property
    def slots(self) -> int:
        """The patches of an image."""
        return (self.side // self.patch) ** 2


ENCODERS: Registry[type[EncoderSpec]] = Registry("encoder")
"""All encoders; importing ``stepladder.models.encoders`` fills it."""


def encoder(name: str) -> Callable[[E], E]:
    """``@encoder("conv")`` above an EncoderSpec registers it under that name."""
    return register(ENCODERS, name)


def conv_flops(layer: nn.Conv2d, places: int) -> float:
    """FLOPs of a convolution that is evaluated at ``places`` places."""
    return 2.0 * layer.weight.numel() * places


def conv(inputs: int, outputs: int, kernel: int, stride: int, padding: int = 0) -> nn.Conv2d:
    """A convolution with N(0, 2 / fan-in) weights and biases of 0, for a rectifier behind it (He et al., 2015)."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    with torch.no_grad():
        assert layer.bias is not None
        layer.bias.zero_()
    return layer
