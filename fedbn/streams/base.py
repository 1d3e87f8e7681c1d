"""In which order, and with which accidents, one person's windows arrive. One file each; a new one is found.

The order decides more than the method: the same windows that a running average follows to near perfection when
shuffled make it collapse when recorded activities last minutes. So a stream is a value, made from recorded windows and
a seed alone and hashed, and every rule of a comparison meets the same one.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedbn.data.population import Examples
from fedbn.errors import UserError
from fedbn.plugins import discover, parse

FOREIGN = -1
"""Label of a window that belongs to no class: it is predicted and learnt from like any other, and never scored."""


@dataclass(frozen=True)
class Event:
    """Something that happens before window ``at`` and that no rule is told: ``kind`` names it."""

    at: int
    kind: str


@dataclass(frozen=True, eq=False)
class Stream:
    """What one device meets, in order.

    Attributes:
        user: whose device it is; the key of the statistics that follow the stream.
        x: ``[n, *shape]`` windows.
        y: ``[n]`` int64 labels, for scoring; `FOREIGN` where there is none.
        who: ``[n]`` int64, which person (index into those that the stream was made from) a window is really of.
        events: what happens on the way, in order.

    Raises:
        ValueError: lengths differ, or the stream is empty.
    """

    user: str
    x: Tensor
    y: Tensor
    who: Tensor
    events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < len(self.x) == len(self.y) == len(self.who):
            raise ValueError(f"{len(self.x)} windows, {len(self.y)} labels, {len(self.who)} persons")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that name the content: windows, labels, persons and events."""
        content = hashlib.sha256(repr((self.user, self.events, tuple(self.x.shape), self.x.dtype)).encode())
        for part in (self.x, self.y, self.who):
            content.update(part.detach().cpu().contiguous().numpy().tobytes())
        return content.hexdigest()[:16]


@dataclass(frozen=True)
class StreamSpec(ABC):
    """How recorded windows become a stream. Fields are options; subclasses lie one to a file in ``fedbn.streams``.

    Attributes:
        name: what the command line calls it.
        about: one line for lists.
        source: authors, year, link; empty for what is plain.
        persons: how many people's windows one stream holds.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str] = ""

    @property
    def persons(self) -> int:
        return 1

    @abstractmethod
    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        """The stream of ``recordings[0]``'s device.

        Args:
            user: name of ``recordings[0]``; with the seed it keys all randomness.
            recordings: `persons` people's windows, each in recorded order.
            seed: of the run.
        """

    def of(self, names: Sequence[str], recordings: Sequence[Examples], seed: int) -> list[Stream]:
        """One stream for each of several people; where it takes more than one, those who come next in the list join.

        Args:
            names: names of the people.
            recordings: their windows, each in recorded order.
            seed: of the run.

        Raises:
            UserError: fewer people than a stream needs.

        >>> one = Examples(torch.zeros(3, 2), torch.tensor([0, 1, 1]), torch.zeros(3))
        >>> [s.user for s in stream("natural").of(["ann", "bob"], [one, one], seed=0)]
        ['ann', 'bob']
        """
        if len(recordings) < self.persons:
            raise UserError(f"stream {self.name!r} takes {self.persons} people and there are {len(recordings)}")
        around = range(self.persons)
        return [
            self.make(name, [recordings[(i + j) % len(recordings)] for j in around], seed)
            for i, name in enumerate(names)
        ]


def arranged(user: str, own: Examples, index: Tensor, events: tuple[Event, ...] = ()) -> Stream:
    """One person's windows in the order ``index``, ``[n]``."""
    return Stream(user, own.x[index], own.y[index], torch.zeros(len(index), dtype=torch.int64), events)


def joined(user: str, parts: Sequence[tuple[int, Examples]], kind: str) -> Stream:
    """Pieces of several people's recordings, one after the other; each boundary is an event of this kind."""
    parts = [(who, piece) for who, piece in parts if len(piece)]
    lengths = torch.tensor([len(piece) for _, piece in parts])
    starts = lengths.cumsum(0)[:-1].tolist()
    return Stream(
        user,
        torch.cat([piece.x for _, piece in parts]),
        torch.cat([piece.y for _, piece in parts]),
        torch.tensor([who for who, _ in parts]).repeat_interleave(lengths),
        tuple(Event(at, kind) for at in starts),
    )


def streams() -> dict[str, type[StreamSpec]]:
    """All kinds of stream found, by name."""
    return discover("fedbn.streams", StreamSpec)


def stream(text: str) -> StreamSpec:
    """The spec that a text such as ``natural`` or ``dirichlet:delta=0.1`` names.

    Raises:
        UserError: unknown name or option, or an option out of range.
    """
    return parse(text, "stream", streams())


def positive(spec: StreamSpec, **values: float) -> None:
    """Raise unless all options given are above 0."""
    for option, value in values.items():
        if not value > 0:
            raise UserError(f"stream {spec.name!r}: {option} must be above 0, not {value:g}")


def share(spec: StreamSpec, **values: float) -> None:
    """Raise unless all options given lie strictly between 0 and 1."""
    for option, value in values.items():
        if not 0 < value < 1:
            raise UserError(f"stream {spec.name!r}: {option} is a share between 0 and 1, not {value:g}")
