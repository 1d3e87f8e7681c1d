"""A client's heavy work as a value.

A handler of the ClientApp unpacks a message, describes what is to be computed as a job and calls `execute`.
In a SuperNode, in a Ray actor or in a plain call the job runs there and then. The seam is what an engine needs
that wants to run the jobs of a round together; the app does not change for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from fedbn.evaluation import Column, Score
from fedbn.federation import client_consult, client_evaluation, client_round, client_talk
from fedbn.moments import Moments
from fedbn.roles import State
from fedbn.setting import Setting
from fedbn.strategy import Progress, Update

Result = TypeVar("Result", covariant=True)


class Job(Protocol[Result]):
    """Work of one client, complete in itself."""

    def run(self) -> Result:
        """Do it alone."""
        ...


def execute(job: Job[Result]) -> Result:
    """The result of a job."""
    return job.run()


@dataclass(frozen=True)
class Train:
    """One round of local training."""

    here: Setting
    user: int
    received: State
    kept: State | None
    progress: Progress
    heard: Sequence[dict[str, Moments]] = ()
    told: State = field(default_factory=dict)

    def run(self) -> tuple[Update, State]:
        """The update to send and the entries to keep."""
        return client_round(self.here, self.user, self.received, self.kept, self.progress, self.heard, self.told)


@dataclass(frozen=True)
class Consult:
    """One exchange about the first batch of a round."""

    here: Setting
    user: int
    received: State
    kept: State | None
    progress: Progress
    heard: Sequence[dict[str, Moments]]

    def run(self) -> dict[str, Moments] | None:
        """What the client says next; None at the end."""
        return client_consult(self.here, self.user, self.received, self.kept, self.progress, self.heard)


@dataclass(frozen=True)
class Evaluate:
    """One user's cells of the evaluation matrix."""

    here: Setting
    user: int
    received: State
    kept: State | None
    columns: tuple[Column, ...]
    globally: tuple[Column, ...]
    registry: dict[int, State] | None = None

    def run(self) -> list[Score]:
        """The scores."""
        return client_evaluation(
            self.here,
            self.user,
            self.received,
            self.kept,
            columns=self.columns,
            globally=self.globally,
            registry=self.registry,
        )


@dataclass(frozen=True)
class Settle:
    """One exchange in agreeing on statistics."""

    here: Setting
    user: int
    received: State
    kept: State | None
    answers: list[dict[str, Moments]]

    def run(self) -> dict[str, Moments] | None:
        """What the client says next; None at the end."""
        return client_talk(self.here, self.user, self.received, self.kept, self.answers)
