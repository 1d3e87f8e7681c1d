"""Base class of the scenarios with wearable sensors: windows of recordings of real people at 50 Hz."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedbn.data.packages import SOURCES, Arrays, cached, fetch
from fedbn.data.population import Population, User, hold_out, hold_out_order
from fedbn.data.windows import hop
from fedbn.scenarios.base import Scenario

TRIPLES = ((0, 1, 2), (3, 4, 5))
"""Channels of the axes of accelerometer and gyroscope."""


@dataclass(frozen=True)
class WearableScenario(Scenario):
    """Windows ``[6, window]`` of acceleration (g) and rotation (rad/s) from a packaged file; people are held out.

    Attributes:
        source: short name of the packaged file (`fedbn.data.packages.SOURCES`).
        version: version of the parsed arrays.
        classes: names of the activities.
        skew: one sentence that describes the skew between users.
        unseen: number of people that never train.
        window: samples per window.
        overlap: fraction of a window that overlaps with the next one, in [0, 1).
        reserved: number of excluded people, those whom the first seeds would hold out. Choose settings on the other
            people and confirm them on these.
    """

    model: ClassVar[str] = "har-cnn"
    plan: ClassVar[dict[str, object]] = {
        "rounds": 20,
        "schedule": "cosine",
        "local_epochs": 1,
        "batch_size": 32,
        "lr": 0.05,
        "momentum": 0.9,
    }
    source: ClassVar[str]
    version: ClassVar[int] = 1
    classes: ClassVar[tuple[str, ...]]
    skew: ClassVar[str]

    unseen: int = 2
    window: int = 128
    overlap: float = 0.5
    reserved: int = 0

    @staticmethod
    @abstractmethod
    def parse(path: Path) -> Arrays:
        """Parse the packaged file into arrays."""

    @abstractmethod
    def split(self, rows: Arrays, step: int) -> list[tuple[int, User]]:
        """Person number and `User` of each client, with windows ``step`` samples apart."""

    def rows(self) -> tuple[Arrays, dict[str, str]]:
        """The parsed file, and its hash by name."""
        source = SOURCES[self.source]
        path = fetch(source)
        return cached(self.source, self.version, source.sha256, lambda: self.parse(path)), {source.label: source.sha256}

    def load(self, seed: int) -> Population:
        step = hop(self.window, self.overlap)
        rows, sources = self.rows()
        users = self.split(rows, step)
        people = sorted({person for person, _ in users})
        unseen = {people[i] for i in hold_out(len(people), self.unseen, seed, self.reserved)}
        reserved = {people[i] for i in hold_out_order(len(people))[: self.reserved]}
        users = [(person, user) for person, user in users if person not in reserved]
        return Population(
            users=tuple(user for _, user in users),
            unseen=tuple(i for i, (person, _) in enumerate(users) if person in unseen),
            classes=self.classes,
            skew=self.skew,
            sources=sources,
            triples=TRIPLES,
        )
