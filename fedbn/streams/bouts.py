"""Activities in bouts: a synthetic order with a chosen bout length and class mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedbn.data.population import Examples
from fedbn.errors import UserError
from fedbn.seeds import numpy_generator
from fedbn.streams.base import Stream, StreamSpec, reorder


@dataclass(frozen=True)
class Bouts(StreamSpec):
    """As many windows as were recorded, in bouts of one class with geometric length.

    The next class is drawn from the prior over the other classes. A bout continues with the class's windows where the
    last one stopped, and wraps around at the end. With a skewed prior, windows therefore recur.

    Attributes:
        length: mean length of a bout, in windows.
        prior: relative frequency of each class as a next bout, ``prior=5+2+1``; empty for equal.

    >>> own = Examples(torch.arange(40.0)[:, None], torch.arange(40) % 4, torch.zeros(40))
    >>> long = Bouts(length=10).make("ann", [own], seed=0).y
    >>> int((long.diff() != 0).sum()) < 15
    True
    """

    name = "bouts"
    about = "bouts of one class, of geometric length, with a class prior"
    needs_classes = True
    bounds = (("length", "at least 1 window"),)
    length: float = 25.0
    prior: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for i, share in enumerate(self.prior, 1):
            if not share > 0:
                raise UserError(f"stream 'bouts': prior {i} must be above 0, not {share:g}")

    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        draw = numpy_generator(seed, "stream", self.name, user)
        y = recordings[0].y.cpu().numpy()
        classes = np.unique(y)
        if self.prior and len(self.prior) <= (last := classes.max()):
            numbers = f"prior has {len(self.prior)} numbers"
            raise UserError(f"stream 'bouts': {numbers} but class {last} occurs; give one per class")
        prior = np.array(self.prior)[classes] if self.prior else np.ones(len(classes))
        rows = [np.flatnonzero(y == c) for c in classes]
        position = [int(draw.integers(len(r))) for r in rows]
        order: list[int] = []
        current = -1
        while len(order) < len(y):
            weight = prior * (np.arange(len(classes)) != current) if len(classes) > 1 else prior
            current = int(draw.choice(len(classes), p=weight / weight.sum()))
            for _ in range(draw.geometric(1 / self.length)):
                order.append(rows[current][position[current] % len(rows[current])])
                position[current] += 1
        return reorder(user, recordings[0], torch.tensor(order[: len(y)]))
