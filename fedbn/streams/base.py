"""The order of one person's windows, with switches, gaps and faults. One file each, discovered automatically.

The order matters more than the method: a running average follows shuffled windows almost perfectly and collapses on the
same windows when recorded activities last minutes. A stream is therefore a value, built from recorded windows and a
seed only and hashed, and all rules of a comparison get the same one.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedbn.data.examples import UNLABELED
from fedbn.data.population import Examples, User
from fedbn.errors import UserError
from fedbn.plugins import discover, parse

FOREIGN = UNLABELED
"""Label of a window that belongs to no class. It is predicted and learned from like any other, but never scored."""

BOUNDS: dict[str, Callable[[float], bool]] = {
    "above 0": lambda value: value > 0,
    "at least 1 window": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "a share between 0 and 1": lambda value: 0 < value < 1,
    "a share from 0 to below 1": lambda value: 0 <= value < 1,
}
"""Bounds of options, as in error messages."""


@dataclass(frozen=True)
class Event:
    """An event of type ``kind`` before window ``at``. Rules are not informed of it."""

    at: int
    kind: str


@dataclass(frozen=True, eq=False)
class Stream:
    """The windows of one device, in order.

    Attributes:
        user: owner of the device; the key of the statistics that follow the stream.
        x: ``[n, *shape]`` windows.
        y: ``[n, ...]`` targets, for scoring; `FOREIGN` for windows without a class.
        person_index: ``[n]`` int64, true person of each window (index into the recordings behind the stream).
        events: in order.

    Raises:
        ValueError: lengths differ, or the stream is empty.
    """

    user: str
    x: Tensor
    y: Tensor
    person_index: Tensor
    events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < len(self.x) == len(self.y) == len(self.person_index):
            raise ValueError(f"{len(self.x)} windows, {len(self.y)} labels, {len(self.person_index)} persons")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def digest(self) -> str:
        """Hash of windows, labels, persons and events: sixteen hexadecimal digits."""
        content = hashlib.sha256(repr((self.user, self.events, tuple(self.x.shape), self.x.dtype)).encode())
        for part in (self.x, self.y, self.person_index):
            content.update(part.detach().cpu().contiguous().numpy().tobytes())
        return content.hexdigest()[:16]


@dataclass(frozen=True)
class StreamSpec(ABC):
    """Builds streams from recorded windows. Fields are options; each subclass has its own file in ``fedbn.streams``.

    Attributes:
        name: name on the command line.
        about: one-line description for lists.
        source: authors, year, link; empty if there is none.
        bounds: options and the `BOUNDS` that they must satisfy.
        needs_classes: whether windows are ordered or added by class, so that each window must have one.
        num_persons: number of people whose windows are in one stream.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str] = ""
    bounds: ClassVar[tuple[tuple[str, str], ...]] = ()
    needs_classes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for option, bound in self.bounds:
            if not BOUNDS[bound](value := getattr(self, option)):
                raise UserError(f"stream {self.name!r}: {option} must be {bound}, not {value:g}")

    @property
    def num_persons(self) -> int:
        return 1

    def recording_of(self, user: User) -> Examples:
        """The windows of a user that a stream consists of: all of the test recordings, or those with a class."""
        return user.test if self.needs_classes or user.stream is None else user.stream

    @abstractmethod
    def make(self, user: str, recordings: Sequence[Examples], seed: int) -> Stream:
        """The stream of the device that belongs to the person of ``recordings[0]``.

        Args:
            user: name of that person; keys all randomness, together with the seed.
            recordings: windows of `num_persons` people, each in recorded order.
            seed: of the run.
        """

    def make_all(self, names: Sequence[str], recordings: Sequence[Examples], seed: int) -> list[Stream]:
        """One stream per person. A stream that needs several people also uses the next ones in the list.

        Args:
            names: names of the people.
            recordings: their windows, each in recorded order.
            seed: of the run.

        Raises:
            UserError: fewer people than a stream needs.

        >>> one = Examples(torch.zeros(3, 2), torch.tensor([0, 1, 1]), torch.zeros(3))
        >>> [s.user for s in stream("natural").make_all(["ann", "bob"], [one, one], seed=0)]
        ['ann', 'bob']
        """
        if len(recordings) < self.num_persons:
            raise UserError(f"stream {self.name!r} needs {self.num_persons} people and there are {len(recordings)}")
        offsets = range(self.num_persons)
        return [
            self.make(name, [recordings[(i + j) % len(recordings)] for j in offsets], seed)
            for i, name in enumerate(names)
        ]


def reorder(user: str, own: Examples, index: Tensor, events: tuple[Event, ...] = ()) -> Stream:
    """One person's windows in the order ``index``, ``[n]``."""
    return Stream(user, own.x[index], own.y[index], torch.zeros(len(index), dtype=torch.int64), events)


def concatenate(user: str, parts: Sequence[tuple[int, Examples]], kind: str) -> Stream:
    """Parts of several people's recordings, one after the other; each boundary is an event of this kind."""
    parts = [(person, part) for person, part in parts if len(part)]
    lengths = torch.tensor([len(part) for _, part in parts])
    return Stream(
        user,
        torch.cat([part.x for _, part in parts]),
        torch.cat([part.y for _, part in parts]),
        torch.tensor([person for person, _ in parts]).repeat_interleave(lengths),
        tuple(Event(at, kind) for at in lengths.cumsum(0)[:-1].tolist()),
    )


def streams() -> dict[str, type[StreamSpec]]:
    """All stream types, by name."""
    return discover("fedbn.streams", StreamSpec)


def stream(text: str) -> StreamSpec:
    """Parse a stream from text such as ``natural`` or ``dirichlet:delta=0.1``.

    Raises:
        UserError: unknown name or option, or an option out of range.
    """
    return parse(text, "stream", streams())
