"""A sensor fault: some channels are stuck for a while and then recover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedbn.data.population import Examples
from fedbn.seeds import generator
from fedbn.streams.base import Event, Stream, StreamSpec, reorder


@dataclass(frozen=True)
class Fault(StreamSpec):
    """From a third of the recording on, half of the channels (random; at least one) repeat their last value.

    A fault that would exceed the recording ends with it.

    Attributes:
        lasting: duration of the fault as a share of the windows.

    >>> own = Examples(torch.rand(9, 2, 4), torch.zeros(9, dtype=torch.int64), torch.zeros(9))
    >>> stuck = Fault().make("ann", [own], seed=0)
    >>> [e.at for e in stuck.events], int((stuck.x[3:5].std(2) == 0).sum())
    ([3, 5], 2)
    """

    name = "fault"
    about = "half of the channels are stuck for a while"
    bounds = (("lasting", "a share between 0 and 1"),)
    lasting: float = 0.2

    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        own = recordings[0]
        start, length = len(own) // 3, max(1, round(self.lasting * len(own)))
        channels = own.x.shape[1]
        draw = generator(seed, "stream", self.name, user)
        stuck = torch.randperm(channels, generator=draw)[: max(1, channels // 2)].to(own.x.device)
        x = own.x.clone()
        last = x[max(start - 1, 0), stuck].flatten(1)[:, -1] if x.dim() > 2 else x[max(start - 1, 0), stuck]
        rows = torch.arange(start, min(start + length, len(own)), device=x.device)
        x[rows[:, None], stuck] = last.view(1, -1, *[1] * (x.dim() - 2)).expand(len(rows), -1, *x.shape[2:])
        events = (Event(start, "fault"), *([Event(start + length, "repair")] if start + length < len(own) else []))
        return reorder(user, Examples(x, own.y, own.recording), torch.arange(len(own)), events)
