"""A client's heavy work as a value.

A handler of the ClientApp unpacks a message, describes what is to be computed as a job and calls `execute`.
In a SuperNode, in a Ray actor or in a plain call the job runs there and then. Within `run_batched`, an engine's way to
run the jobs of a round at once, every call of the app is a greenlet: `execute` suspends it until all have come to
their job, and resumes it with its result. The app does not change for it, and nothing runs in parallel here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from greenlet import getcurrent, greenlet

from fedbn.federation.client import client_consensus, client_evaluation, client_round, client_sync_first_batch
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
    """Work of one client, complete in itself.

    Attributes:
        kind: what a tier knows it as (`fedbn.stacked.executors.Work`).
    """

    kind: ClassVar[Kind]

    def run(self) -> Result:
        """Do it alone."""
        ...


def execute(job: Job[Result]) -> Result:
    """The result of a job."""
    current = getcurrent()
    return current.parent.switch(job) if isinstance(current, _BatchedCall) and current.parent else job.run()


def is_batched() -> bool:
    """Whether the caller is one of several calls in this process (`run_batched`)."""
    return isinstance(getcurrent(), _BatchedCall)


class _BatchedCall(greenlet):  # type: ignore[misc]
    """A call that hands its job to its parent."""


def run_batched(calls: Sequence[Callable[[], Reply]], run: Callable[[list[Any]], Sequence[object]]) -> list[Reply]:
    """Make all calls; jobs of one kind that they have come to are run at once.

    Args:
        calls: each may call `execute`, several times too; none raises.
        run: does jobs of one kind; in the place of one's result it may give a `fedbn.stacked.cohort.Failure`.

    Returns:
        What the calls return, in their order.

    >>> @dataclass(frozen=True)
    ... class Double:
    ...     kind: ClassVar[Kind] = "consensus"
    ...     number: int = 0
    >>> run_batched([lambda: execute(Double(number=3)), lambda: 7], lambda jobs: [2 * j.number for j in jobs])
    [6, 7]
    """
    replies: dict[int, Reply] = {}
    waiting: dict[int, tuple[_BatchedCall, Job[Any]]] = {}

    def note(i: int, call: _BatchedCall, answer: Any) -> None:
        if call.dead:
            replies[i] = answer
        else:
            waiting[i] = (call, answer)

    for i, function in enumerate(calls):
        call = _BatchedCall(function)
        note(i, call, call.switch())
    while waiting:
        kind = type(next(iter(waiting.values()))[1])
        chosen = {i: waiting.pop(i) for i, (_, job) in list(waiting.items()) if type(job) is kind}
        results = run([job for _, job in chosen.values()])
        for (i, (call, _)), result in zip(chosen.items(), results, strict=True):
            note(i, call, call.throw(result.error) if isinstance(result, Failure) else call.switch(result))
    return [replies[i] for i in range(len(calls))]


@dataclass(frozen=True)
class Train:
    """One round of local training."""

    kind: ClassVar[Kind] = "train"
    ctx: RunContext
    user: int
    received: State
    client_state: State | None
    progress: Progress
    aggregates: Sequence[dict[str, Moments]] = ()
    broadcast: State = field(default_factory=dict)

    def run(self) -> tuple[Update, State]:
        """The update to send and the entries to keep."""
        return client_round(
            self.ctx, self.user, self.received, self.client_state, self.progress, self.aggregates, self.broadcast
        )


@dataclass(frozen=True)
class SyncFirstBatch:
    """One exchange about the first batch of a round."""

    kind: ClassVar[Kind] = "consensus"
    ctx: RunContext
    user: int
    received: State
    client_state: State | None
    progress: Progress
    aggregates: Sequence[dict[str, Moments]]

    def run(self) -> dict[str, Moments] | None:
        """What the client says next; None at the end."""
        return client_sync_first_batch(
            self.ctx, self.user, self.received, self.client_state, self.progress, self.aggregates
        )


@dataclass(frozen=True)
class Evaluate:
    """One user's cells of the evaluation matrix."""

    kind: ClassVar[Kind] = "evaluate"
    ctx: RunContext
    user: int
    received: State
    client_state: State | None
    columns: tuple[Column, ...]
    globally: tuple[Column, ...]
    client_statistics: dict[int, State] | None = None

    def run(self) -> list[Score]:
        """The scores."""
        return client_evaluation(
            self.ctx,
            self.user,
            self.received,
            self.client_state,
            columns=self.columns,
            globally=self.globally,
            client_statistics=self.client_statistics,
        )


@dataclass(frozen=True)
class SyncStatistics:
    """One exchange in agreeing on statistics."""

    kind: ClassVar[Kind] = "consensus"
    ctx: RunContext
    user: int
    received: State
    client_state: State | None
    answers: list[dict[str, Moments]]

    def run(self) -> dict[str, Moments] | None:
        """What the client says next; None at the end."""
        return client_consensus(self.ctx, self.user, self.received, self.client_state, self.answers)
