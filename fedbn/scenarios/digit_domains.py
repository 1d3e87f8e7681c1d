"""Base class of the scenarios with digits of six domains (`fedbn.scenarios.glyphs`), one client per domain.

The skew is a *feature* skew. Part of it is natural (writers and instruments), and part of it comes from the rendering
of the domains that do not have images of that size.

Images are independent of each other and some files are sorted by class, so their order does not reflect time. Rows are
in a fixed random order. The file of ``mfeat`` contains six images twice; none of them is on both sides of the
split.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedbn.data.population import Examples, Population, User, hold_out
from fedbn.errors import UserError, unknown
from fedbn.scenarios.base import Scenario
from fedbn.scenarios.glyphs import Domain, blend, crops, domains
from fedbn.seeds import numpy_generator

Part = Literal["train", "test"]


@dataclass(frozen=True)
class DigitScenario(Scenario):
    """Six clients. A fifth of a domain's digits, stratified by class, is the test data.

    Of the rest, ``train`` digits are used, so that all domains have the same weight. No digit is a training image in
    one domain and a test image in another.

    Attributes:
        classes: class names.
        skew: one sentence that describes the skew between users.
        unseen: number of domains that never train, or their names joined by ``+``.
        train: number of training images per domain.
        test: maximum number of test images per domain; none for all.
    """

    classes: ClassVar[tuple[str, ...]] = tuple("0123456789")
    skew: ClassVar[str] = "feature skew: six kinds of digits, partly rendered here; labels and quantity balanced"

    unseen: str = "1"
    train: int = 743
    test: int | None = None

    @abstractmethod
    def examples(self, domain: Domain, rows: np.ndarray, part: Part) -> tuple[Tensor, Tensor]:
        """Values ``[n, channels, 28, 28]`` and targets ``[n, ...]``, one example for each row of a domain."""

    def load(self, seed: int) -> Population:
        found = domains()
        return Population(
            users=tuple(map(self._user, found)),
            unseen=self._unseen([domain.name for domain in found], seed),
            classes=self.classes,
            skew=self.skew,
            sources={f"digits/{d.name}": hashlib.sha256(d.images.tobytes()).hexdigest() for d in found},
        )

    def _unseen(self, names: list[str], seed: int) -> tuple[int, ...]:
        if self.unseen.isdigit():
            return hold_out(len(names), int(self.unseen), seed)
        selected = self.unseen.split("+")
        for name in selected:
            if name not in names:
                raise unknown(f"domain of scenario {self.name!r}", name, names)
        if len(set(selected)) == len(names):
            raise UserError("unseen lists all six domains, which leaves no user for training; leave one out")
        return tuple(sorted({names.index(name) for name in selected}))

    def _user(self, domain: Domain) -> User:
        train, test = split(domain)
        if not 10 <= self.train <= len(train):
            raise UserError(f"train={self.train}: choose 10 to {len(train)}, the size of domain {domain.name!r}")
        if self.test is not None and self.test < 1:
            raise UserError(f"test={self.test}: choose 1 or more, or none for all test images")
        selected: list[tuple[Part, np.ndarray]] = [("train", train[: self.train]), ("test", test[: self.test])]
        parts: list[Examples] = []
        for part, rows in selected:
            x, y = self.examples(domain, rows, part)
            parts.append(Examples(x, y, torch.full((len(y),), len(parts))))
        return User(domain.name, domain.name, *parts)


def split(domain: Domain) -> tuple[np.ndarray, np.ndarray]:
    """Training and test rows of a domain, in a fixed random order; no training image equals a test image.

    The test rows are the first fifth of each class, so the rows left over start with the classes that filled up first.
    They are shuffled again: their first rows are a random sample of the training rows, like the first test rows are one
    of the test rows.
    """
    rng = numpy_generator(0, "digits", "split", domain.name)
    order = rng.permutation(len(domain.labels))
    is_test = np.zeros(len(order), bool)
    for digit in range(10):
        members = order[domain.labels[order] == digit]
        is_test[members[: len(members) // 5]] = True
    train, test = rng.permutation(order[~is_test[order]]), order[is_test[order]]
    tested = {domain.images[row].tobytes() for row in test}
    return train[[domain.images[row].tobytes() not in tested for row in train]], test


def backgrounds(domain: Domain, count: int, part: Part, rng: np.random.Generator) -> np.ndarray:
    """Gray pieces ``[count, 28, 28]`` of photographs, in [0, 255].

    Test images use the right quarter of the photographs, and training images the rest.
    """
    edge = 3 * domain.photographs.shape[2] // 4
    columns = slice(None, edge) if part == "train" else slice(edge, None)
    return crops(domain.photographs[:, :, columns], count, rng).mean(3)


def look(domain: Domain, images: np.ndarray, part: Part, rng: np.random.Generator) -> np.ndarray:
    """Gray images of digits ``[n, 28, 28]``, on photographs if the domain's digits are."""
    return blend(images, backgrounds(domain, len(images), part, rng)) if domain.has_photographs else images


def pixels(images: np.ndarray) -> Tensor:
    """Values ``[n, channels, 28, 28]`` in [-1, 1] of bytes ``[n, 28, 28]`` or ``[n, 28, 28, channels]``."""
    x = torch.from_numpy(images).float().div(255).sub(0.5).div(0.5)
    return (x.permute(0, 3, 1, 2) if x.ndim == 4 else x[:, None]).contiguous()
