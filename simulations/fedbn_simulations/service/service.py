"""Objects that the routes share: users, queue, quotas, and the audit log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from fedbn_simulations.service.access import RateLimiter
from fedbn_simulations.service.batching import Batcher, Job
from fedbn_simulations.service.durability import GroupCommit
from fedbn_simulations.service.middleware import caller
from fedbn_simulations.service.observability import Metrics
from fedbn_simulations.service.schema import Answer, RequestError, parse_json, parse_windows
from fedbn_simulations.service.users import UserStore

AUDIT = logging.getLogger("fedbn.service.audit")
"""Receives one record per administrative action that has succeeded."""

SMALL_BODY = 65_536
"""Bytes of a body up to which it is parsed on the event loop, in at most a few milliseconds."""

T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """Shared objects of the routes.

    Attributes:
        users: the users; only used on the batcher's thread.
        batcher: queue in front of the users.
        metrics: counters.
        quota: windows per user.
        saving: writes changes to the store; None without a store.
        parser: thread that parses large bodies.
    """

    users: UserStore
    batcher: Batcher
    metrics: Metrics
    quota: RateLimiter
    saving: GroupCommit | None
    parser: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "parser"))

    async def parse(self, body: bytes, function: Callable[[bytes], T]) -> T:
        """Parse a body; a large one not on the event loop."""
        if len(body) <= SMALL_BODY:
            return function(body)
        return await asyncio.get_running_loop().run_in_executor(self.parser, function, body)

    async def parse_json(self, request: Request) -> dict[str, Any]:
        """Body of a request, a JSON object."""
        elements = self.users.limits.elements(self.users.shape)
        return await self.parse(await request.body(), lambda body: parse_json(body, elements))

    async def windows(self, user: str, body: bytes, binary: bool, *, learn: bool, hold: bool = False) -> Answer:
        """Predict the windows of one request body."""
        users, limits = self.users, self.users.limits
        if learn:
            users.require_writable()
        elements = limits.elements(users.shape)
        windows = await self.parse(body, lambda b: parse_windows(b, binary, users.shape, limits.windows, elements))
        self.count_windows(user, len(windows))
        return await self.batcher.submit(Job(user, windows, learn, hold))

    def count_windows(self, user: str, n: int) -> None:
        """Count windows of a user.

        Raises:
            RequestError: more than the user's quota.
        """
        if wait := self.quota.acquire(user, n):
            raise RequestError(429, f"more than {self.quota.rate:g} windows per second of one user: try later", wait)

    async def change(self, function: Callable[[], T], request: Request, action: str = "") -> T:
        """Call a function that changes users, and wait until the changes are on disk.

        Args:
            function: runs on the bank's thread.
            request: the request that is answered after it.
            action: name of the action in the audit log; empty: not an administrative action.
        """
        self.users.require_writable()
        result = await self.batcher.call(lambda: self.users.change(function))
        if self.saving is not None:
            await self.saving.saved()
        if action:
            audit(request, action)
        return result


def audit(request: Request, action: str) -> None:
    """Log an administrative action: what, on which user, and from which address."""
    fields = {"action": action, "user": request.path_params["user"], "caller": caller(request.scope)}
    AUDIT.info("audit", extra={"fields": fields})
