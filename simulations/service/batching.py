"""Single requests become few calls: whoever waits while the bank works goes into its next call together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from torch import Tensor

from simulations.service.schema import Answer, Refusal

LOOKS = 3
"""Turns of the event loop without a new request after which the bank is called: bytes become a request in two."""

LEFT = 256
"""Jobs that a call leaves behind before it is closed, so that a long queue of one user is not searched through."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Job:
    """Windows of one request.

    Attributes:
        user: whose.
        windows: ``[n, *shape]``.
        learn: the user's statistics follow them.
        hold: keep them for labels that come later.
    """

    user: str
    windows: Tensor
    learn: bool
    hold: bool = False

    @cached_property
    def n(self) -> int:
        """Windows."""
        return len(self.windows)


Work = Callable[[Sequence[Job]], Sequence["Answer | Exception"]]


class Batcher:
    """One thread that alone touches the bank, and the queue before it.

    A call takes jobs of one kind, in their order and each of another user; further ones of its users wait for the next.
    Every window is so answered with what was learnt from those of its user before it, as if requests came one after the
    other. The next call is not made before what has arrived meanwhile is in the queue: a call of few costs as much as
    one of many.

    Args:
        work: answers jobs, one answer or exception each; runs on the thread.
        rows: windows a call at most, unless one job alone has more.
        room: windows that may wait; further jobs are refused.
    """

    def __init__(self, work: Work, rows: int = 64, room: int = 4096) -> None:
        self.work, self.rows, self.room = work, rows, room
        self.calls = self.done = 0
        self._waiting: deque[tuple[Job, asyncio.Future[Answer]]] = deque()
        self._windows = 0
        self._thread = ThreadPoolExecutor(1, "bank")
        self._pump: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Windows in the queue."""
        return self._windows

    async def submit(self, job: Job) -> Answer:
        """The answer to a job.

        Raises:
            Refusal: the queue is full, or what ``work`` raised for this job.
        """
        n = job.n
        if self._windows + n > self.room:
            raise Refusal(503, f"{self._windows} windows are waiting already: try again in a second", wait=1)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, future))
        self._windows += n
        if self._pump is None:
            self._pump = asyncio.create_task(self._run())
        return await future

    async def call(self, function: Callable[[], T]) -> T:
        """Run anything else on the bank's thread, after the call under way."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def close(self) -> None:
        """Finish what waits, then stop the thread."""
        if self._pump is not None:
            await self._pump
        self._thread.shutdown()

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._gather()
                await self._turn()
        finally:
            self._pump = None

    async def _gather(self) -> None:
        """Let requests in that the network has already brought, until a look at it brings none or there are enough."""
        quiet, met = 0, self._windows
        while quiet < LOOKS and self._windows < self.rows:
            await asyncio.sleep(0)
            quiet, met = (0 if self._windows > met else quiet + 1), self._windows

    async def _turn(self) -> None:
        taken = self._take()
        if not taken:
            return
        jobs = [job for job, _ in taken]
        try:
            answers = await self.call(lambda: self.work(jobs))
        except Exception as error:
            answers = [error] * len(jobs)
        self.calls += 1
        self.done += sum(job.n for job in jobs)
        for (_, future), answer in zip(taken, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _take(self) -> list[tuple[Job, asyncio.Future[Answer]]]:
        """The next call's jobs; those that nobody waits for any more fall away."""
        taken: list[tuple[Job, asyncio.Future[Answer]]] = []
        later: list[tuple[Job, asyncio.Future[Answer]]] = []
        users: set[str] = set()
        rows = 0
        while self._waiting and rows < self.rows and len(later) < LEFT:
            job, future = self._waiting.popleft()
            if future.done():
                self._windows -= job.n
                continue
            if not taken or (job.learn == taken[0][0].learn and job.user not in users and rows + job.n <= self.rows):
                taken.append((job, future))
                self._windows -= job.n
                rows += job.n
            else:
                later.append((job, future))
            # Windows that stay behind must not be overtaken by their user's later ones.
            users.add(job.user)
        self._waiting.extendleft(reversed(later))
        return taken
