"""Turning and shifting images, by chance and by more and more: pure functions of (key, item, step)."""

from __future__ import annotations

import itertools
from typing import Annotated

import numpy as np
from pydantic import field_validator

from stepladder.core.config import Config, Field
from stepladder.core.keys import Key, unit

Share = Annotated[float, Field(ge=0, le=1)]
Step = Annotated[int, Field(ge=0)]
Ramp = Share | tuple[tuple[Step, Share], ...]


class Augment(Config):
    """How training images are changed: each with ``probability``, turned and shifted by up to ``severity`` times the
    bounds. Both may be ramps over steps; test images are never changed."""

    degrees: float = Field(10.0, ge=0, le=180, description="largest turn, either way")
    translate: float = Field(0.1, ge=0, le=1, description="largest shift along each axis, as a fraction of the side")
    probability: Ramp = Field(
        1.0, description="share of the images changed; or [[step, share], ...], linear in between"
    )
    severity: Ramp = Field(1.0, description="share of the bounds; or [[step, share], ...], linear in between")

    @field_validator("probability", "severity")
    @classmethod
    def _in_order(cls, ramp: Ramp) -> Ramp:
        if isinstance(ramp, tuple):
            steps = [step for step, _ in ramp]
            if not steps or any(after <= before for before, after in itertools.pairwise(steps)):
                raise ValueError("must be a number or a list of [step, share] with rising steps")
        return ramp

    def at(self, step: int) -> tuple[float, float]:
        """Probability and severity at a step; before the first and after the last point they are constant."""
        return _value(self.probability, step), _value(self.severity, step)

    def changed(self, secret: Key, items: np.ndarray, step: int) -> np.ndarray:
        """Which items [n] are changed at a step: bool [n]. One that is stays so while the probability does not fall."""
        return unit(secret.words(items, 4)[:, 0]) < self.at(step)[0]

    def __call__(self, secret: Key, items: np.ndarray, pixels: np.ndarray, step: int) -> np.ndarray:
        """The images of ``items`` [n], uint8 ``[n, C, Y, X]``, as they are shown at a step.

        An item's turn and shifts are its own, whenever it is shown; the severity of the step scales them.
        """
        words = secret.words(items, 4)
        chosen = self.changed(secret, items, step)
        luck = 2 * unit(words[chosen, 1:]) - 1
        severity = self.at(step)[1]
        angle = np.deg2rad(self.degrees * severity * luck[:, 0])
        shift = self.translate * severity * pixels.shape[-1] * luck[:, 1:]
        shown = pixels.copy()
        shown[chosen] = affine(pixels[chosen], angle, shift)
        return shown


def _value(ramp: Ramp, step: int) -> float:
    if isinstance(ramp, tuple):
        steps, shares = zip(*ramp, strict=True)
        return float(np.interp(step, steps, shares))
    return ramp


def affine(pixels: np.ndarray, angle: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Images uint8 ``[n, C, Y, X]`` turned about their centres by ``angle`` [n] (radians, positive: counter-clockwise
    as seen), then shifted by ``shift`` [n, 2] pixels (down, right): bilinear, black where nothing was."""
    n, _, height, width = pixels.shape
    y, x = np.meshgrid(np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij")
    # For every pixel of the result, where it comes from: undo the shift, then the turn.
    y, x = y[None] - shift[:, 0, None, None], x[None] - shift[:, 1, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    from_y = cos * y + sin * x + (height - 1) / 2
    from_x = cos * x - sin * y + (width - 1) / 2
    top, left = np.floor(from_y).astype(np.int64), np.floor(from_x).astype(np.int64)
    down, right = (from_y - top)[:, None], (from_x - left)[:, None]
    image, result = np.arange(n)[:, None, None], np.zeros(pixels.shape)
    for dy, dx in itertools.product((0, 1), (0, 1)):
        row, column = top + dy, left + dx
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        # [n, Y, X, C]: advanced indices around a slice put its axis last.
        found = pixels[image, :, row.clip(0, height - 1), column.clip(0, width - 1)].transpose(0, 3, 1, 2)
        share = (down if dy else 1 - down) * (right if dx else 1 - right)
        result += found * share * inside[:, None]
    return np.rint(result).clip(0, 255).astype(np.uint8)
