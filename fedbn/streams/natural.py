"""The recorded order: the only one that occurs in deployment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedbn.data.population import Examples
from fedbn.streams.base import Stream, StreamSpec, reorder


@dataclass(frozen=True)
class Natural(StreamSpec):
    """All windows as recorded.

    >>> own = Examples(torch.arange(3.0)[:, None], torch.tensor([1, 1, 0]), torch.zeros(3))
    >>> Natural().make("ann", [own], seed=0).y.tolist()
    [1, 1, 0]
    """

    name = "natural"
    about = "windows as recorded"

    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        return reorder(user, recordings[0], torch.arange(len(recordings[0])))
