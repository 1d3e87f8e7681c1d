"""Several people's windows under one user name, as on a shared device without accounts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedbn.data.population import Examples
from fedbn.seeds import generator
from fedbn.streams.base import Stream, StreamSpec


@dataclass(frozen=True)
class Mixed(StreamSpec):
    """Recordings interleaved at random, each in its own order.

    Attributes:
        people: number of people.

    >>> a = Examples(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), torch.zeros(4))
    >>> Mixed().make("ann", [a, a], seed=0).person_index.sum().item()
    4
    """

    name = "mixed"
    about = "several people's windows interleaved"
    bounds = (("people", "at least 2"),)
    people: int = 2

    @property
    def num_persons(self) -> int:
        return self.people

    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        owner = torch.arange(len(recordings)).repeat_interleave(torch.tensor([len(p) for p in recordings]))
        shuffled = owner[torch.randperm(len(owner), generator=generator(seed, "stream", self.name, user))]
        order = torch.empty_like(owner)
        order[shuffled.argsort(stable=True)] = torch.arange(len(owner))
        return Stream(
            user, torch.cat([p.x for p in recordings])[order], torch.cat([p.y for p in recordings])[order], shuffled
        )
