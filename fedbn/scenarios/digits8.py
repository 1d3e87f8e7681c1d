"""Digits8: scikit-learn's 8x8 digits, distributed to a few users with different cameras.

Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI (1998), as shipped by
``sklearn.datasets.load_digits``. It needs no download and loads quickly, for tests and first steps. Images are assigned
at random. The differences between users are *synthetic*: each user has a gain and an offset, and some have inverted
images. Results on this scenario do not transfer to real users.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch

from fedbn.data.population import Examples, Population, User, hold_out
from fedbn.errors import UserError
from fedbn.scenarios.base import Scenario
from fedbn.seeds import numpy_generator

IMAGES = 1797
MIN_PER_USER = 25


@dataclass(frozen=True)
class Digits8(Scenario):
    """1,797 images ``[1, 8, 8]``, 10 classes; three quarters of each user's images are training data.

    Attributes:
        unseen: number of users that never train.
        users: number of users, 2 to 60.
        images: number of images to distribute, at least 25 per user.
    """

    name: ClassVar[str] = "digits8"
    about: ClassVar[str] = "8x8 digits, 10 made-up cameras; tiny, for tests and first steps"
    model: ClassVar[str] = "small-cnn"
    plan: ClassVar[dict[str, object]] = {"rounds": 10, "local_epochs": 1, "batch_size": 16, "lr": 0.05, "momentum": 0.9}

    citation: ClassVar[str] = "Alpaydin, Kaynak, Optical Recognition of Handwritten Digits, UCI (1998)"
    license: ClassVar[str] = "BSD-3-Clause (scikit-learn); data originally from the UCI repository"

    unseen: int = 2
    users: int = 10
    images: int = IMAGES

    def load(self, seed: int) -> Population:
        if not 2 <= self.users <= 60:
            raise UserError(f"users={self.users}: choose 2 to 60, the 1,797 images are too few for more")
        if not MIN_PER_USER * self.users <= self.images <= IMAGES:
            least = MIN_PER_USER * self.users
            raise UserError(f"images={self.images}: choose {least} ({MIN_PER_USER} per user) to {IMAGES}")
        pixels, labels = load_digits()
        images = (pixels.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
        order = numpy_generator(0, "digits8", "deal").permutation(len(labels))
        users = []
        for i in range(self.users):
            name = f"user{i + 1:02d}"
            # The assignment to users is random, but each user's images keep the order of the file.
            rows = np.sort(order[: self.images][i :: self.users])
            observed, domain = _apply_camera(images[rows], name)
            x = torch.from_numpy(observed)
            y = torch.from_numpy(labels[rows])
            cut = 3 * len(rows) // 4
            train, test = (
                Examples(x[part], y[part], torch.full((len(y[part]),), k))
                for k, part in enumerate((slice(None, cut), slice(cut, None)))
            )
            users.append(User(name, domain, train, test))
        return Population(
            users=tuple(users),
            unseen=hold_out(self.users, self.unseen, seed),
            classes=tuple("0123456789"),
            skew="synthetic feature skew: gain, offset and inversion per user; labels independent of the user",
            sources={"sklearn/load_digits": hashlib.sha256(pixels.astype(np.uint8).tobytes()).hexdigest()},
        )


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels ``[n, 64]`` and labels ``[n]`` as from ``sklearn.datasets.load_digits``, whose import takes a second.

    >>> [part.shape for part in load_digits()]
    [(1797, 64), (1797,)]
    """
    sklearn = cast(ModuleSpec, find_spec("sklearn"))
    rows = np.loadtxt(Path(cast(str, sklearn.origin)).with_name("datasets") / "data" / "digits.csv.gz", delimiter=",")
    return rows[:, :-1], rows[:, -1].astype(np.int64)


def _apply_camera(images: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """Apply a user's camera to images in [0, 1]; return the images and the kind of camera, the same in every run."""
    rng = numpy_generator(0, "digits8", "camera", name)
    gain, offset, inverted = rng.uniform(0.6, 1.4), rng.uniform(-0.3, 0.3), rng.random() < 0.3
    observed = (1 - images if inverted else images) * np.float32(gain) + np.float32(offset)
    return observed.astype(np.float32), "inverted" if inverted else "upright"
