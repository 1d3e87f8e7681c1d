"""Digit masks: the pixels of a digit that lies over a photograph, recorded by six scanners.

The task is segmentation. Each domain has digits of its own kind and a scanner of its own: contrast, brightness, blur
and noise, as with the imaging devices of several hospitals. The scanners are *synthetic*. Training and test images have
backgrounds from different parts of the photographs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy
import torch
from torch import Tensor

from fedbn.scenarios.digit_domains import DigitScenario, Part, backgrounds
from fedbn.scenarios.glyphs import Domain
from fedbn.seeds import numpy_generator

INK = 128
"""Smallest gray value of a digit's pixels, of 255."""


@dataclass(frozen=True)
class Scanner:
    """A scanner: ``contrast * (blurred image + noise) + brightness``, for images in [0, 1].

    Attributes:
        contrast: factor of the values.
        brightness: value of black.
        blur: standard deviation of the blur, in pixels.
        noise: standard deviation of the noise.
    """

    contrast: float
    brightness: float
    blur: float
    noise: float

    def record(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Record images ``[n, height, width]``."""
        blurred = scipy.ndimage.gaussian_filter(images, (0, self.blur, self.blur))
        noise = rng.normal(0, self.noise, images.shape)
        return (self.contrast * (blurred + noise) + self.brightness).astype(np.float32)


SCANNERS: dict[str, Scanner] = {
    "mnist": Scanner(contrast=1.0, brightness=0.0, blur=0.4, noise=0.05),
    "optdigits": Scanner(contrast=0.4, brightness=0.6, blur=0.8, noise=0.05),
    "mfeat": Scanner(contrast=1.6, brightness=-0.6, blur=0.4, noise=0.15),
    "pendigits": Scanner(contrast=0.6, brightness=-0.3, blur=0.8, noise=0.10),
    "fonts": Scanner(contrast=2.0, brightness=0.3, blur=0.6, noise=0.10),
    "mnistm": Scanner(contrast=0.8, brightness=0.9, blur=0.6, noise=0.05),
}


@dataclass(frozen=True)
class DigitMasks(DigitScenario):
    """Images ``[1, 28, 28]`` and masks ``[28, 28]`` of two classes; options as in `DigitScenario`."""

    name: ClassVar[str] = "digit-masks"
    about: ClassVar[str] = "segmentation: digits over photographs, 6 domains (scanners)"
    model: ClassVar[str] = "unet"
    task: ClassVar[str] = "segmentation"
    plan: ClassVar[dict[str, object]] = {"rounds": 6, "batch_size": 16, "lr": 0.1, "global_test": 60}
    classes: ClassVar[tuple[str, ...]] = ("background", "digit")
    skew: ClassVar[str] = "feature skew: six kinds of digits, and synthetic scanners; quantity balanced"

    train: int = 100
    test: int | None = 50

    def examples(self, domain: Domain, rows: np.ndarray, part: Part) -> tuple[Tensor, Tensor]:
        rng = numpy_generator(0, self.name, domain.name, part)
        glyphs = domain.glyphs[rows]
        images = 0.6 * backgrounds(domain, len(rows), part, rng) / 255 + 0.4 * glyphs / 255
        x = SCANNERS[domain.name].record(images, rng)
        return torch.from_numpy(x)[:, None], torch.from_numpy((glyphs >= INK).astype(np.int64))
