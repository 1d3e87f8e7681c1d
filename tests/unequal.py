"""A scenario for tests: users with different numbers of images, class mixes, cameras and recordings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fedbn.data.population import Examples, Population, User, hold_out
from fedbn.scenarios.base import Scenario
from fedbn.scenarios.digits8 import _apply_camera
from fedbn.seeds import numpy_generator

SIZES = (24, 70, 33, 57, 45, 64, 30, 50, 41, 35)
"""Training rows of each user. Batches of 32 leave remainders of 24, 6, 1, 25, 13, 0, 30, 18, 9 and 3 rows."""


@dataclass(frozen=True)
class Unequal(Scenario):
    """596 images of scikit-learn's digits. Sizes differ threefold; class proportions are drawn from Dirichlet(1).

    Attributes:
        recordings: largest number of recordings in the training and in the test data of a user.
    """

    name: ClassVar[str] = "unequal"
    about: ClassVar[str] = "digits of users with unequal data"
    model: ClassVar[str] = "small-cnn"
    plan: ClassVar[dict[str, object]] = {"lr": 0.05, "momentum": 0.9}

    recordings: int = 1

    def load(self, seed: int) -> Population:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        rng, cuts = numpy_generator(0, "unequal"), numpy_generator(0, "unequal", "recordings")
        order = rng.permutation(len(labels))
        rest = {k: order[labels[order] == k].tolist() for k in range(10)}
        users = []
        for i, size in enumerate(SIZES):
            mix = rng.dirichlet(np.ones(10))
            rows = [rest[k].pop() for k in rng.choice(10, size + size // 3, p=mix)]
            images = (pixels[rows].reshape(-1, 1, 8, 8) / 16).astype(np.float32)
            observed, domain = _apply_camera(images, name := f"user{i + 1:02d}")
            # Without noise, kernels with mean zero map the background to zero, where rounding decides on ReLU.
            observed += rng.normal(0, 0.02, observed.shape).astype(np.float32)
            x, y = torch.from_numpy(observed), torch.from_numpy(labels[rows])
            number = _numbers(size, 1 + i % self.recordings, cuts), _numbers(size // 3, 1 + i % self.recordings, cuts)
            number[1].add_(number[0][-1] + 1)
            train, test = Examples(x[:size], y[:size], number[0]), Examples(x[size:], y[size:], number[1])
            users.append(User(name, domain, train, test))
        return Population(tuple(users), hold_out(len(users), 2, seed), tuple("0123456789"), "synthetic, for tests")


def _numbers(rows: int, recordings: int, rng: np.random.Generator) -> torch.Tensor:
    """Recording of each row; lengths are drawn at random."""
    cuts = np.sort(rng.choice(np.arange(1, rows), recordings - 1, replace=False))
    return torch.from_numpy(np.searchsorted(cuts, np.arange(rows), side="right"))
