"""Practical test-time adaptation (RoTTA): classes split over time slots of any size by a Dirichlet distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedbn.data.population import Examples
from fedbn.seeds import numpy_generator
from fedbn.streams.base import Stream, StreamSpec, reorder
from fedbn.streams.dirichlet import split_by_weight

MAX_SLOTS = 100


@dataclass(frozen=True)
class Ptta(StreamSpec):
    r"""As many slots as classes (at most 100), with class shares from :math:`Dir(\gamma)` and random class order.

    Attributes:
        gamma: concentration.

    >>> own = Examples(torch.arange(40.0)[:, None], torch.arange(40) % 4, torch.zeros(40))
    >>> sorted(Ptta().make("ann", [own], seed=0).x.flatten().tolist()) == own.x.flatten().tolist()
    True
    """

    name = "ptta"
    about = "classes split over slots of any size by a Dirichlet distribution"
    source = "Yuan, Xie, Li 2023 (RoTTA), https://arxiv.org/abs/2303.13899"
    needs_classes = True
    bounds = (("gamma", "above 0"),)
    gamma: float = 0.1

    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        draw = numpy_generator(seed, "stream", self.name, user)
        y = recordings[0].y.cpu().numpy()
        classes = np.unique(y)
        slots = min(len(classes), MAX_SLOTS)
        parts = [split_by_weight(np.flatnonzero(y == c), draw.dirichlet([self.gamma] * slots)) for c in classes]
        order = [parts[c][slot] for slot in range(slots) for c in draw.permutation(len(classes))]
        return reorder(user, recordings[0], torch.from_numpy(np.concatenate(order)))
