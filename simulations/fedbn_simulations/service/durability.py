"""Durability: changes of users are on disk before they are acknowledged.

The bank's thread puts changes into a `Journal` and continues. Another thread writes all changes that have accumulated
in one transaction (group commit), and requests are answered after the transaction that contains their changes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Literal

from fedbn.online.stores import SQLiteStore, Store, StoreError

LOG = logging.getLogger("fedbn.service")

Durability = Literal["full", "relaxed"]
"""``full``: every change is on disk before it is acknowledged. ``relaxed``: windows without labels are acknowledged
before, and are written within `RELAXED_SECONDS`."""

RELAXED_SECONDS = 1.0
"""Seconds between two transactions with ``relaxed``, and before a failed one is tried again."""

STALLED_SECONDS = 5.0
"""Duration of a transaction after which the store counts as failed."""


class Journal(Store):
    """A store whose changes wait in memory until `commit` writes them.

    Reading sees the changes that wait. All methods but `commit` must be called by one thread.

    Args:
        store: the store on disk.

    Attributes:
        failure: error of the last transaction; None if it succeeded.
    """

    def __init__(self, store: SQLiteStore) -> None:
        self.store = store
        self.failure: StoreError | None = None
        self._started: float | None = None
        self._lock = threading.Lock()
        self._waiting: dict[str, bytes | None] = {}
        self._writing: dict[str, bytes | None] = {}

    def __getitem__(self, user: str) -> bytes:
        with self._lock:
            found, record = self._find(user)
        if not found:
            return self.store[user]
        if record is None:
            raise KeyError(user)
        return record

    def __contains__(self, user: object) -> bool:
        with self._lock:
            found, record = self._find(user)
        return record is not None if found else user in self.store

    def __setitem__(self, user: str, record: bytes) -> None:
        with self._lock:
            self._waiting[user] = record

    def __delitem__(self, user: str) -> None:
        if user not in self:
            raise KeyError(user)
        with self._lock:
            self._waiting[user] = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.page("", -1))

    def __len__(self) -> int:
        return len(self.page("", -1))

    def page(self, after: str, limit: int) -> list[str]:
        """Up to ``limit`` names in alphabetical order, starting after ``after``; -1: all."""
        with self._lock:
            changes = self._writing | self._waiting
        # Deleted users take places of the page that users behind them fill.
        deleted = sum(record is None for record in changes.values())
        stored = self.store.page(after, limit if limit < 0 else limit + deleted)
        known = {user for user in stored if changes.get(user, b"") is not None}
        known |= {user for user, record in changes.items() if record is not None and user > after}
        return list(islice(sorted(known), None if limit < 0 else limit))

    @property
    def pending(self) -> bool:
        """Whether changes wait."""
        return bool(self._waiting or self._writing)

    def require_writable(self) -> None:
        """Check that changes can be written at present.

        Raises:
            StoreError: the last transaction failed, or the current one hangs.
        """
        if self.failure is not None:
            raise StoreError(str(self.failure), full=self.failure.full)
        started = self._started
        if started is not None and time.monotonic() - started > STALLED_SECONDS:
            raise StoreError(f"store {self.store.file} does not respond: check its disk")

    def commit(self) -> None:
        """Write the changes that wait, in one transaction.

        Raises:
            StoreError: they could not be written, and wait for the next call.
        """
        with self._lock:
            self._writing, self._waiting = self._waiting, {}
        if not self._writing:
            return
        self._started = time.monotonic()
        try:
            self.store.apply(self._writing)
            self.failure = None
        except BaseException as error:
            with self._lock:
                self._waiting = self._writing | self._waiting
            if isinstance(error, StoreError):
                self.failure = error
            raise
        finally:
            self._started = None
            with self._lock:
                self._writing = {}

    def _find(self, user: object) -> tuple[bool, bytes | None]:
        for changes in (self._waiting, self._writing):
            if user in changes:
                return True, changes[user]  # type: ignore[index]
        return False, None


class GroupCommit:
    """Runs transactions on a thread, each for all callers that wait.

    Args:
        commit: writes all changes so far.
    """

    def __init__(self, commit: Callable[[], None]) -> None:
        self._commit = commit
        self._thread = ThreadPoolExecutor(1, "store")
        self._waiting: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    async def saved(self) -> None:
        """Wait until the changes made before this call are on disk.

        Raises:
            StoreError: they could not be written.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        await future

    async def close(self) -> None:
        """Finish the current transaction and stop the thread."""
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                error: BaseException | None = None
                try:
                    await loop.run_in_executor(self._thread, self._commit)
                except Exception as failure:
                    LOG.error("writing to the store failed", extra={"fields": {"reason": str(failure)}})
                    error = failure
                for future in group:
                    if future.done():
                        continue
                    if error is None:
                        future.set_result(None)
                    else:
                        future.set_exception(error)
        finally:
            self._task = None
