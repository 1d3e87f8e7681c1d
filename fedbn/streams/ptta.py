"""Practical test-time adaptation, RoTTA's stream: classes over time slots by a Dirichlet draw, slots of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedbn.data.population import Examples
from fedbn.seeds import numpy_generator
from fedbn.streams.base import Stream, StreamSpec, arranged, positive
from fedbn.streams.dirichlet import pieces

MOST_SLOTS = 100


@dataclass(frozen=True)
class Ptta(StreamSpec):
    r"""As many slots as classes (at most 100), each class split over them by :math:`Dir(\gamma)`, their order drawn.

    Attributes:
        gamma: concentration.

    >>> own = Examples(torch.arange(40.0)[:, None], torch.arange(40) % 4, torch.zeros(40))
    >>> sorted(Ptta().make("ann", [own], seed=0).x.flatten().tolist()) == own.x.flatten().tolist()
    True
    """

    name = "ptta"
    about = "classes spread over slots of free size by a Dirichlet distribution"
    source = "Yuan, Xie, Li 2023 (RoTTA), https://arxiv.org/abs/2303.13899"
    gamma: float = 0.1

    def __post_init__(self) -> None:
        positive(self, gamma=self.gamma)

    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        draw = numpy_generator(seed, "stream", self.name, user)
        y = recordings[0].y.cpu().numpy()
        classes = np.unique(y)
        slots = min(len(classes), MOST_SLOTS)
        split = [pieces(np.flatnonzero(y == c), draw.dirichlet([self.gamma] * slots)) for c in classes]
        order = [split[c][slot] for slot in range(slots) for c in draw.permutation(len(classes))]
        return arranged(user, recordings[0], torch.from_numpy(np.concatenate(order)))
