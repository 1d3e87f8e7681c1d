"""Another person takes over the device without notice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedbn.data.population import Examples
from fedbn.streams.base import Stream, StreamSpec, concatenate


@dataclass(frozen=True)
class Switch(StreamSpec):
    """One person's recording up to a point, then another person's.

    Attributes:
        at: share of the recording after which the person changes.

    >>> a = Examples(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), torch.zeros(4))
    >>> Switch().make("ann", [a, a], seed=0).person_index.tolist()
    [0, 0, 1, 1]
    """

    name = "switch"
    about = "another person takes over"
    bounds = (("at", "a share between 0 and 1"),)
    at: float = 0.5

    @property
    def num_persons(self) -> int:
        return 2

    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        before, after = (torch.arange(len(p)) for p in recordings)
        first, second = before[: round(self.at * len(before))], after[round(self.at * len(after)) :]
        return concatenate(user, [(0, recordings[0].take(first)), (1, recordings[1].take(second))], "switch")
