"""One class after the other: the strongest possible label correlation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedbn.data.population import Examples
from fedbn.seeds import generator
from fedbn.streams.base import Stream, StreamSpec, reorder


@dataclass(frozen=True)
class Sorted(StreamSpec):
    """All windows of one class, then all of another. The class order is random; within a class it is as recorded.

    >>> own = Examples(torch.arange(4.0)[:, None], torch.tensor([1, 0, 1, 0]), torch.zeros(4))
    >>> Sorted().make("ann", [own], seed=0).x.flatten().tolist() in ([1, 3, 0, 2], [0, 2, 1, 3])
    True
    """

    name = "sorted"
    about = "one class after the other"
    needs_classes = True

    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        y = recordings[0].y.cpu()
        rank = torch.randperm(int(y.max()) + 1, generator=generator(seed, "stream", self.name, user))
        return reorder(user, recordings[0], rank[y].argsort(stable=True))
