"""Request batching: requests that arrive during a call of the bank are processed together in the next call."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from torch import Tensor

from fedbn_simulations.service.schema import Answer, RequestError

IDLE_TURNS = 3
"""Event loop iterations without a new request before the bank is called. Parsing a request takes two."""

MAX_SKIPPED = 256
"""Jobs that may be skipped while a batch is formed. Limits the search through a long queue of one user."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Job:
    """The windows of one request.

    Attributes:
        user: name of the user.
        windows: ``[n, *shape]``.
        learn: whether the user's statistics are updated.
        hold: whether the windows are stored until labels arrive.
    """

    user: str
    windows: Tensor
    learn: bool
    hold: bool = False

    @cached_property
    def n(self) -> int:
        """Number of windows."""
        return len(self.windows)


Batch = list[tuple[Job, "asyncio.Future[Answer]"]]

Handler = Callable[[Sequence[Job]], Sequence["Answer | Exception"]]


class Batcher:
    """Queue and worker thread for the bank. No other thread may use the bank.

    A batch has jobs of one type (learning or not), in order of arrival and at most one per user. Further jobs of a user
    wait for the next batch, so results are the same as for sequential requests. A batch starts only after all requests
    that have already arrived are in the queue, since small batches cost as much as large ones.

    Args:
        handler: answers jobs, with one answer or exception per job; runs on the thread.
        max_batch: maximum number of windows per batch, unless a single job has more.
        max_queue: maximum number of windows in the queue; further jobs are rejected.
        saved: waits until the changes so far are on disk. Jobs that learn are answered after it; the next batch does
            not wait. None: they are answered immediately.

    Attributes:
        num_calls: number of batches so far.
        num_windows: number of windows processed so far.
        queued: number of windows in the queue.
    """

    def __init__(
        self,
        handler: Handler,
        max_batch: int = 64,
        max_queue: int = 4096,
        saved: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.handler, self.max_batch, self.max_queue, self.saved = handler, max_batch, max_queue, saved
        self.num_calls = self.num_windows = self.queued = 0
        self._queue: deque[tuple[Job, asyncio.Future[Answer]]] = deque()
        self._thread = ThreadPoolExecutor(1, "bank")
        self._task: asyncio.Task[None] | None = None
        self._saving: set[asyncio.Task[None]] = set()

    async def submit(self, job: Job) -> Answer:
        """The answer to a job.

        Raises:
            RequestError: the queue is full, or the handler returned this error for the job.
        """
        n = job.n
        if self.queued + n > self.max_queue:
            raise RequestError(503, f"{self.queued} windows are already queued: try again in a second", retry_after=1)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queue.append((job, future))
        self.queued += n
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await future

    async def call(self, function: Callable[[], T]) -> T:
        """Run any other function on the bank's thread, after the current batch."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def close(self) -> None:
        """Process the queue, then stop the thread."""
        if self._task is not None:
            await self._task
        if self._saving:
            await asyncio.wait(self._saving)
        self._thread.shutdown()

    async def _run(self) -> None:
        try:
            while self._queue:
                await self._collect()
                await self._process_batch()
        finally:
            self._task = None

    async def _collect(self) -> None:
        """Wait until no request has arrived for `IDLE_TURNS` iterations, or a batch is full."""
        idle, before = 0, self.queued
        while idle < IDLE_TURNS and self.queued < self.max_batch:
            await asyncio.sleep(0)
            idle, before = (0 if self.queued > before else idle + 1), self.queued

    async def _process_batch(self) -> None:
        batch = self._next_batch()
        if not batch:
            return
        jobs = [job for job, _ in batch]
        answers: Sequence[Answer | Exception]
        try:
            answers = await self.call(lambda: self.handler(jobs))
        except Exception as error:
            answers = [error] * len(jobs)
        self.num_calls += 1
        self.num_windows += sum(job.n for job in jobs)
        if self.saved is None or not jobs[0].learn:
            self._resolve(batch, answers)
            return
        task = asyncio.create_task(self._save(batch, answers, self.saved))
        self._saving.add(task)
        task.add_done_callback(self._saving.discard)

    async def _save(
        self, batch: Batch, answers: Sequence[Answer | Exception], saved: Callable[[], Awaitable[None]]
    ) -> None:
        try:
            await saved()
        except Exception as error:
            answers = [answer if isinstance(answer, Exception) else error for answer in answers]
        self._resolve(batch, answers)

    def _resolve(self, batch: Batch, answers: Sequence[Answer | Exception]) -> None:
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _next_batch(self) -> Batch:
        """Remove the jobs of the next batch from the queue; canceled ones are dropped."""
        batch: Batch = []
        skipped: Batch = []
        users: set[str] = set()
        rows = 0
        while self._queue and rows < self.max_batch and len(skipped) < MAX_SKIPPED:
            job, future = self._queue.popleft()
            if future.done():
                self.queued -= job.n
                continue
            if not batch or (
                job.learn == batch[0][0].learn and job.user not in users and rows + job.n <= self.max_batch
            ):
                batch.append((job, future))
                self.queued -= job.n
                rows += job.n
            else:
                skipped.append((job, future))
            # Later windows of a user must not overtake skipped ones.
            users.add(job.user)
        self._queue.extendleft(reversed(skipped))
        return batch
