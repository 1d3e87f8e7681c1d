"""People who take turns on a device: statistics of each person are needed again later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedbn.data.population import Examples
from fedbn.streams.base import Stream, StreamSpec, concatenate


@dataclass(frozen=True)
class Recurring(StreamSpec):
    """Each person's recording is split into consecutive parts, which alternate.

    Attributes:
        people: number of people who share the device.
        visits: number of turns per person.

    >>> a = Examples(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), torch.zeros(4))
    >>> Recurring(people=2, visits=2).make("ann", [a, a], seed=0).person_index.tolist()
    [0, 0, 1, 1, 0, 0, 1, 1]
    """

    name = "recurring"
    about = "several people take turns"
    source = "Hoang et al. 2024 (PeTTA), https://arxiv.org/abs/2311.18193"
    bounds = (("people", "at least 2"), ("visits", "at least 2"))
    people: int = 2
    visits: int = 3

    @property
    def num_persons(self) -> int:
        return self.people

    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        parts = [[p.take(rows) for rows in torch.arange(len(p)).tensor_split(self.visits)] for p in recordings]
        turns = [(i, parts[i][visit]) for visit in range(self.visits) for i in range(self.people)]
        return concatenate(user, turns, "switch")
