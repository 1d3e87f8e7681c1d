"""People who share a device by turns: what was learnt of one is needed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedbn.data.population import Examples
from fedbn.errors import UserError
from fedbn.streams.base import Stream, StreamSpec, joined


@dataclass(frozen=True)
class Recurring(StreamSpec):
    """Each person's recording in consecutive parts, taken by turns.

    Attributes:
        people: how many share the device.
        visits: turns that each of them has.

    >>> a = Examples(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), torch.zeros(4))
    >>> Recurring(people=2, visits=2).make("ann", [a, a], seed=0).who.tolist()
    [0, 0, 1, 1, 0, 0, 1, 1]
    """

    name = "recurring"
    about = "several people by turns"
    source = "Hoang et al. 2024 (PeTTA), https://arxiv.org/abs/2311.18193"
    people: int = 2
    visits: int = 3

    def __post_init__(self) -> None:
        for option, value in (("people", self.people), ("visits", self.visits)):
            if value < 2:
                raise UserError(f"stream 'recurring': {option} must be at least 2, not {value}")

    @property
    def persons(self) -> int:
        return self.people

    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        parts = [[p.take(rows) for rows in torch.arange(len(p)).tensor_split(self.visits)] for p in recordings]
        turns = [(who, parts[who][visit]) for visit in range(self.visits) for who in range(self.people)]
        return joined(user, turns, "switch")
