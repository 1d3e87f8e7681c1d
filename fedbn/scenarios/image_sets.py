"""Base class of the scenarios with a published image data set that has no users (MNIST, CIFAR, ...).

Rows are dealt to the users at random, so there is no skew. A partition such as ``dirichlet:alpha=0.1:clients=20`` makes
clients with label skew, and a shift such as ``contrast,inversion`` makes cameras.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedbn.data.columns import Rows
from fedbn.data.images import ImageSet
from fedbn.data.population import Population, build_population
from fedbn.errors import UserError
from fedbn.scenarios.base import Scenario
from fedbn.seeds import numpy_generator


@dataclass(frozen=True)
class ImageScenario(Scenario):
    """Images ``[channels, height, width]`` in [-1, 1]; training and test rows as published, or split anew.

    Attributes:
        path: directory of the files.
        split: ``published`` uses the published test images for testing; ``pooled`` merges both parts, and ``share`` of
            each user's images are test data, as in PFLlib.
        share: fraction of a user's images for testing with ``split=pooled``, in (0, 1).
        images: maximum number of images of each part, a random selection; none for all.
        users: number of users.
        unseen: number of users that never train.
    """

    path: str = ""
    split: str = "published"
    share: float = 0.25
    images: int | None = None
    users: int = 20
    unseen: int = 1

    model: ClassVar[str] = "image-cnn"
    plan: ClassVar[dict[str, object]] = {"rounds": 30, "local_epochs": 1, "batch_size": 32, "lr": 0.05}

    @property
    @abstractmethod
    def data_name(self) -> str:
        """Name of the data set, under which a run records its hash."""

    @abstractmethod
    def read(self) -> ImageSet:
        """Read the files."""

    def load(self, seed: int) -> Population:
        if self.split not in ("published", "pooled"):
            raise UserError(f"split={self.split}: choose published or pooled")
        if self.users < 1 or (self.images is not None and self.images < 2 * self.users):
            raise UserError(f"users={self.users}, images={self.images}: at least 1 user with 2 images each are needed")
        data = self.read()
        chosen = self._selection(data.split)
        pixels = data.images[chosen]
        owner = numpy_generator(0, "image set", "deal").permutation(len(chosen)) % self.users
        rows = Rows(
            x=(pixels / np.float32(127.5) - 1).astype(np.float32),
            y=data.labels[chosen],
            user=np.array([f"user{i:03d}" for i in range(self.users)])[owner],
            recording=None,
            classes=data.classes,
            split=data.split[chosen] if self.split == "published" else None,
        )
        population = build_population(
            rows,
            name=self.data_name,
            test=self.share,
            gap=0,
            unseen=self.unseen,
            seed=seed,
            skew="none: images dealt at random",
            sources={self.data_name: hashlib.sha256(pixels.tobytes() + data.labels[chosen].tobytes()).hexdigest()},
            by_class=False,
        )
        return replace(population, notices=data.notices)

    def _selection(self, split: np.ndarray) -> np.ndarray:
        """Row numbers in random order, at most ``images`` of each part."""
        rng = numpy_generator(0, "image set", "rows")
        rows = rng.permutation(len(split))
        if self.images is None:
            return rows
        return np.concatenate([rows[split[rows] == part][: self.images] for part in ("train", "test")])
