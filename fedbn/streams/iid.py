"""Shuffled windows: used by most published comparisons, but unrealistic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedbn.data.population import Examples
from fedbn.seeds import generator
from fedbn.streams.base import Stream, StreamSpec, reorder


@dataclass(frozen=True)
class Iid(StreamSpec):
    """All windows in random order.

    >>> own = Examples(torch.arange(9.0)[:, None], torch.arange(9), torch.zeros(9))
    >>> sorted(Iid().make("ann", [own], seed=0).y.tolist()) == own.y.tolist()
    True
    """

    name = "iid"
    about = "windows shuffled"

    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        draw = generator(seed, "stream", self.name, user)
        return reorder(user, recordings[0], torch.randperm(len(recordings[0]), generator=draw))
