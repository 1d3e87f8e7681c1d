"""A gap in the recording, after which the person does something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedbn.data.population import Examples
from fedbn.streams.base import Event, Stream, StreamSpec, reorder


@dataclass(frozen=True)
class Gap(StreamSpec):
    """The recording without a part in its middle.

    Attributes:
        missing: share of missing windows.

    >>> own = Examples(torch.arange(8.0)[:, None], torch.zeros(8, dtype=torch.int64), torch.zeros(8))
    >>> Gap(missing=0.5).make("ann", [own], seed=0).x.flatten().tolist()
    [0.0, 1.0, 6.0, 7.0]
    """

    name = "gap"
    about = "the middle of the recording is missing"
    bounds = (("missing", "a share between 0 and 1"),)
    missing: float = 0.3

    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        n = len(recordings[0])
        lost = min(round(self.missing * n), n - 1)
        start = (n - lost) // 2
        rows = torch.cat([torch.arange(start), torch.arange(start + lost, n)])
        return reorder(user, recordings[0], rows, (Event(start, "gap"),))
