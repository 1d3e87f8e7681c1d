"""The computation of a client as a job object.

A handler of the ClientApp unpacks a message, creates a job and calls `execute`. In a SuperNode, in a Ray actor or in a
plain call, the job runs immediately. In `run_batched`, with which an engine runs the jobs of a round at once, each call
of the app is a greenlet: `execute` suspends it until all calls have submitted their job, and resumes it with its
result. The app needs no change for this, and nothing runs in parallel here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from greenlet import getcurrent, greenlet

from fedbn.federation.client import client_evaluation, client_round, client_sync_first_batch, client_sync_statistics
from fedbn.federation.cold_start import ClientStatistics
from fedbn.federation.context import RunContext
from fedbn.federation.metrics import Column, Score
from fedbn.nn.roles import State
from fedbn.stacked.cohort import Failure
from fedbn.stacked.executors import Kind
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import Progress, Update

Result = TypeVar("Result", covariant=True)
Reply = TypeVar("Reply")


class Job(Protocol[Result]):
    """A self-contained job of one client.

    Attributes:
        kind: the kind of job for an executor (`fedbn.stacked.executors.Job`).
    """

    kind: ClassVar[Kind]

    def run(self) -> Result:
        """Run this job by itself."""
        ...


def execute(job: Job[Result]) -> Result:
    """Run a job, or hand it to the enclosing `run_batched`, and return its result."""
    current = getcurrent()
    return current.parent.switch(job) if isinstance(current, _BatchedCall) and current.parent else job.run()


def is_batched() -> bool:
    """Whether the caller runs inside `run_batched`."""
    return isinstance(getcurrent(), _BatchedCall)


class _BatchedCall(greenlet):  # type: ignore[misc]
    """A call that passes its job to its parent greenlet."""


def run_batched(calls: Sequence[Callable[[], Reply]], run: Callable[[list[Any]], Sequence[object]]) -> list[Reply]:
    """Make all calls and run their pending jobs of the same kind together.

    Args:
        calls: functions that can call `execute` any number of times and do not raise.
        run: runs jobs of one kind; the result of a job can be a `fedbn.stacked.cohort.Failure`.

    Returns:
        The return values of the calls, in order.

    >>> @dataclass(frozen=True)
    ... class Double:
    ...     kind: ClassVar[Kind] = "consensus"
    ...     number: int = 0
    >>> run_batched([lambda: execute(Double(number=3)), lambda: 7], lambda jobs: [2 * j.number for j in jobs])
    [6, 7]
    """
    replies: dict[int, Reply] = {}
    waiting: dict[int, tuple[_BatchedCall, Job[Any]]] = {}

    def record(i: int, call: _BatchedCall, value: Any) -> None:
        if call.dead:
            replies[i] = value
        else:
            waiting[i] = (call, value)

    for i, function in enumerate(calls):
        call = _BatchedCall(function)
        record(i, call, call.switch())
    while waiting:
        kind = type(next(iter(waiting.values()))[1])
        selected = {i: waiting.pop(i) for i, (_, job) in list(waiting.items()) if type(job) is kind}
        results = run([job for _, job in selected.values()])
        for (i, (call, _)), result in zip(selected.items(), results, strict=True):
            record(i, call, call.throw(result.error) if isinstance(result, Failure) else call.switch(result))
    return [replies[i] for i in range(len(calls))]


@dataclass(frozen=True)
class _ClientJob:
    """Fields shared by all jobs."""

    ctx: RunContext
    user: int
    received: State
    client_state: State | None

    def _inputs(self) -> tuple[RunContext, int, State, State | None]:
        return self.ctx, self.user, self.received, self.client_state


@dataclass(frozen=True)
class Train(_ClientJob):
    """One round of local training."""

    kind: ClassVar[Kind] = "train"
    progress: Progress
    aggregates: Sequence[dict[str, Moments]] = ()
    broadcast: State = field(default_factory=dict)

    def run(self) -> tuple[Update, State]:
        """Return the update for the server and the new client state."""
        return client_round(*self._inputs(), self.progress, self.aggregates, self.broadcast)


@dataclass(frozen=True)
class SyncFirstBatch(_ClientJob):
    """One exchange of moments of the first batch of a round."""

    kind: ClassVar[Kind] = "consensus"
    progress: Progress
    aggregates: Sequence[dict[str, Moments]]

    def run(self) -> dict[str, Moments] | None:
        """Return the client's next moments; None after the last exchange."""
        return client_sync_first_batch(*self._inputs(), self.progress, self.aggregates)


@dataclass(frozen=True)
class SyncStatistics(_ClientJob):
    """One exchange of moments in the synchronization of statistics."""

    kind: ClassVar[Kind] = "consensus"
    aggregates: Sequence[dict[str, Moments]]

    def run(self) -> dict[str, Moments] | None:
        """Return the client's next moments; None after the last exchange."""
        return client_sync_statistics(*self._inputs(), self.aggregates)


@dataclass(frozen=True)
class Evaluate(_ClientJob):
    """One user's cells of the evaluation matrix."""

    kind: ClassVar[Kind] = "evaluate"
    columns: tuple[Column, ...]
    globally: tuple[Column, ...]
    client_statistics: ClientStatistics | None = None
    final: bool = True

    def run(self) -> list[Score]:
        """Return the scores."""
        return client_evaluation(
            *self._inputs(),
            columns=self.columns,
            globally=self.globally,
            client_statistics=self.client_statistics,
            final=self.final,
        )
