"""The device turns on the body, as when it slips or is put back the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fedbn.data.population import Examples
from fedbn.data.shift import rotate
from fedbn.errors import UserError
from fedbn.seeds import generator
from fedbn.streams.base import Event, Stream, StreamSpec, reorder


@dataclass(frozen=True)
class Turned(StreamSpec):
    """The recording, with every triple of channels turned about a random axis from one window on.

    Attributes:
        at: share of the recording after which the device turns; 0: it is worn differently from the start.
        degrees: angle of the turn.

    >>> own = Examples(torch.ones(4, 3, 2), torch.zeros(4, dtype=torch.int64), torch.zeros(4))
    >>> turned = Turned(degrees=180).make("ann", [own], seed=0)
    >>> torch.equal(turned.x[:2], own.x[:2]), torch.allclose(turned.x[2:], own.x[2:])
    (True, False)
    """

    name = "turned"
    about = "the device turns in mid-stream"
    bounds = (("at", "a share from 0 to below 1"), ("degrees", "above 0"))
    at: float = 0.5
    degrees: float = 90.0

    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        own = recordings[0]
        if own.x.dim() != 3 or own.x.shape[1] % 3:
            raise UserError(
                f"stream 'turned' works on 3-axis sensors: windows [3k, length], not examples of shape "
                f"{list(own.x.shape[1:])}"
            )
        draw = generator(seed, "stream", self.name, user)
        turn = rotate(F.normalize(torch.randn(3, generator=draw), dim=0), torch.tensor(self.degrees).deg2rad())
        start = round(self.at * len(own))
        x = torch.cat([own.x[:start], turn(own.x[start:].cpu()).to(own.x)])
        events = (Event(start, "switch"),) if 0 < start < len(own) else ()
        return reorder(user, Examples(x, own.y, own.recording), torch.arange(len(own)), events)
