"""Digit angles: by how many degrees a digit is turned, in six domains of digits.

The task is regression. People write at a slant, and the packaged digits are not upright to the degree, so the angle
cannot be known exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedbn.errors import UserError
from fedbn.scenarios.digit_domains import DigitScenario, Part, look, pixels
from fedbn.scenarios.glyphs import Domain
from fedbn.seeds import numpy_generator


@dataclass(frozen=True)
class DigitAngles(DigitScenario):
    """Images ``[1, 28, 28]`` in [-1, 1]; targets are angles in degrees, counterclockwise, drawn uniformly.

    Attributes:
        limit: largest angle, in degrees; other options as in `DigitScenario`.
    """

    name: ClassVar[str] = "digit-angles"
    about: ClassVar[str] = "regression: angles of turned digits in 6 domains"
    model: ClassVar[str] = "small-cnn"
    task: ClassVar[str] = "regression"
    plan: ClassVar[dict[str, object]] = {
        "rounds": 15,
        "batch_size": 16,
        "lr": 0.05,
        "schedule": "cosine",
        "global_test": 100,
    }
    classes: ClassVar[tuple[str, ...]] = ()
    skew: ClassVar[str] = "feature skew: six kinds of digits, partly rendered here; angles and quantity balanced"

    train: int = 300
    test: int | None = 100
    limit: float = 60.0

    def examples(self, domain: Domain, rows: np.ndarray, part: Part) -> tuple[Tensor, Tensor]:
        if not 0 < self.limit <= 180:
            raise UserError(f"limit={self.limit:g}: choose an angle above 0 and at most 180 degrees")
        rng = numpy_generator(0, self.name, domain.name, part)
        angles = rng.uniform(-self.limit, self.limit, len(rows))
        images = np.stack([turn(glyph, angle) for glyph, angle in zip(domain.glyphs[rows], angles, strict=True)])
        return pixels(look(domain, images, part, rng)), torch.from_numpy(angles.astype(np.float32))


def turn(image: np.ndarray, angle: float) -> np.ndarray:
    """Turn an image ``[height, width]`` counterclockwise about its center, by degrees.

    >>> turn(np.array([[0, 9], [0, 0]], np.uint8), 90)
    array([[9, 0],
           [0, 0]], dtype=uint8)
    """
    return np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR))
