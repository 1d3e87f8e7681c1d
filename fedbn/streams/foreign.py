"""Windows of no known class in between, e.g. from a phone on a table or a child shaking it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedbn.data.population import Examples
from fedbn.seeds import generator
from fedbn.streams.base import FOREIGN, Stream, StreamSpec


@dataclass(frozen=True)
class Foreign(StreamSpec):
    """The recording with foreign windows at random places: windows of the same person with permuted values.

    The values are plausible, the signals are not. Foreign windows are not scored.

    Attributes:
        portion: share of foreign windows in the stream.

    >>> own = Examples(torch.rand(8, 2, 4), torch.zeros(8, dtype=torch.int64), torch.zeros(8))
    >>> (Foreign(portion=0.5).make("ann", [own], seed=0).y == FOREIGN).sum().item()
    8
    """

    name = "foreign"
    about = "with windows of no class in between"
    source = "Gong et al. 2023 (SoTTA), https://arxiv.org/abs/2310.10074"
    needs_classes = True
    bounds = (("portion", "a share between 0 and 1"),)
    portion: float = 0.2

    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        own = recordings[0]
        draw = generator(seed, "stream", self.name, user)
        extra = max(1, round(len(own) * self.portion / (1 - self.portion)))
        values = own.x[torch.randint(len(own), (extra,), generator=draw)].flatten(1)
        scrambled = torch.stack([row[torch.randperm(len(row), generator=draw)] for row in values])
        positions = torch.randperm(len(own) + extra, generator=draw)[:extra]
        is_foreign = torch.zeros(len(own) + extra, dtype=torch.bool).index_fill(0, positions, True)
        x = own.x.new_empty(len(is_foreign), *own.x.shape[1:])
        x[is_foreign], x[~is_foreign] = scrambled.view(extra, *own.x.shape[1:]), own.x
        y = torch.full((len(is_foreign),), FOREIGN, device=own.y.device)
        y[~is_foreign] = own.y
        return Stream(user, x, y, torch.zeros(len(y), dtype=torch.int64))
