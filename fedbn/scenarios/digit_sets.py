"""Digit sets: which digits occur in an image with one to four of them, in six domains of digits.

The task is multi-label classification. A training image shows training digits only, and a test image test digits only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedbn.scenarios.digit_domains import DigitScenario, Part, look, pixels
from fedbn.scenarios.glyphs import SIZE, Domain
from fedbn.seeds import numpy_generator

CELLS = 4


@dataclass(frozen=True)
class DigitSets(DigitScenario):
    """Images ``[1, 28, 28]`` in [-1, 1] with 10 labels; options as in `DigitScenario`.

    An image has four cells of 14x14 pixels. The number of digits is uniform, and so are the digits and their cells.
    """

    name: ClassVar[str] = "digit-sets"
    about: ClassVar[str] = "multi-label: the digits in images of 1 to 4, in 6 domains"
    model: ClassVar[str] = "image-cnn"
    task: ClassVar[str] = "multilabel"
    plan: ClassVar[dict[str, object]] = {
        "rounds": 12,
        "batch_size": 16,
        "lr": 0.1,
        "schedule": "cosine",
        "global_test": 100,
    }

    train: int = 400
    test: int | None = 100

    def examples(self, domain: Domain, rows: np.ndarray, part: Part) -> tuple[Tensor, Tensor]:
        rng = numpy_generator(0, self.name, domain.name, part)
        n = len(rows)
        chosen = rng.choice(rows, (n, CELLS))
        ranks = rng.random((n, CELLS)).argsort(1)
        shown = ranks < rng.integers(1, CELLS + 1, (n, 1))
        images = compose(domain.glyphs[chosen], shown)
        y = np.zeros((n, 10), np.float32)
        example, cell = shown.nonzero()
        y[example, domain.labels[chosen[example, cell]]] = 1
        return pixels(look(domain, images, part, rng)), torch.from_numpy(y)


def compose(glyphs: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Images ``[n, 28, 28]`` of four digits ``[n, 4, 28, 28]`` at half size, of which only those in ``shown`` appear.

    Args:
        glyphs: digits of the cells: top left, top right, bottom left, bottom right.
        shown: whether a cell shows its digit, ``[n, 4]``.
    """
    half = SIZE // 2
    cells = glyphs.reshape(-1, 2, 2, half, 2, half, 2).mean((4, 6)) * shown.reshape(-1, 2, 2, 1, 1)
    return cells.transpose(0, 1, 3, 2, 4).reshape(-1, SIZE, SIZE).astype(np.uint8)
