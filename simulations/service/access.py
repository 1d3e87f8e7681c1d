"""Access control and rate limits of the service."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from fedbn.errors import UserError

MAX_CALLERS = 10_000
"""Callers whose rate is tracked. The least recently seen one is evicted."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")

PUBLIC_PATHS = ("/health",)
"""Paths that need no token."""


@dataclass(frozen=True)
class Access:
    """Authentication and request limits.

    Attributes:
        host: address to listen on. On a loopback address, requests for other hosts are rejected.
        token: bearer token; if empty, no token is required.
        rate: requests (or socket frames) per second and address, with bursts of twice as many. 0 means unlimited. The
            default is far more than one person's devices send, and a fraction of what two cores can answer.
        body: maximum size of a body or frame in bytes.
        timeout: maximum duration of a request in seconds.

    Raises:
        UserError: the address is open to others without a token, or a limit is out of range.
    """

    host: str = "127.0.0.1"
    token: str = ""
    rate: float = 500.0
    body: int = 4_000_000
    timeout: float = 10.0

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and not self.token:
            raise UserError(
                f"--host {self.host} accepts requests from other machines: set a token (environment variable "
                "FEDBN_TOKEN), or use 127.0.0.1"
            )
        if self.token and (len(self.token) < 16 or not self.token.isascii()):
            raise UserError(
                "the token must have 16 ASCII characters or more; create one with: "
                "python -c 'import secrets; print(secrets.token_urlsafe())'"
            )
        if self.rate < 0 or self.body < 1 or self.timeout <= 0:
            raise UserError("--rate must be 0 or more, --body and --timeout above 0")


class RateLimiter:
    """Token bucket per caller.

    >>> limiter = RateLimiter(2.0, clock=iter([0.0, 0.0, 0.0, 0.0, 0.0, 1.0]).__next__)
    >>> [limiter.acquire("ann") for _ in range(6)]
    [0.0, 0.0, 0.0, 0.0, 0.5, 0.0]
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.clock = rate, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def acquire(self, caller: str) -> float:
        """Take one token: 0 on success, otherwise the seconds until the next one."""
        if not self.rate:
            return 0.0
        now, capacity = self.clock(), max(1.0, 2 * self.rate)
        tokens, since = self._buckets.pop(caller, (capacity, now))
        tokens = min(capacity, tokens + (now - since) * self.rate)
        acquired = tokens >= 1
        self._buckets[caller] = (tokens - acquired, now)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        return 0.0 if acquired else (1 - tokens) / self.rate
