"""Access control and rate limits of the service."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from fedbn.errors import UserError

ADDRESSES = 10_000
"""Callers whose rate is remembered; who was not heard for longest is forgotten."""


LOOPBACK = ("127.0.0.1", "::1", "localhost")


OPEN = ("/health",)
"""Paths that need no token."""


@dataclass(frozen=True)
class Access:
    """Who may ask, and how much.

    Attributes:
        host: address that is listened on; on a loopback address only requests for one are answered.
        token: bearer token; empty: none is asked for.
        rate: requests (or frames of a socket) a second and address, twice as many at once. 0: any number. Far more than
            a person's devices send, and a fraction of what two cores answer.
        body: bytes of a body or frame.
        timeout: seconds for a request.

    Raises:
        UserError: open to others without a token, or a limit that serves nobody.
    """

    host: str = "127.0.0.1"
    token: str = ""
    rate: float = 500.0
    body: int = 4_000_000
    timeout: float = 10.0

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and not self.token:
            raise UserError(
                f"--host {self.host} lets other machines in: set a token (environment variable FEDBN_TOKEN), or stay "
                "on 127.0.0.1"
            )
        if self.token and (len(self.token) < 16 or not self.token.isascii()):
            raise UserError(
                "the token must have 16 ASCII characters or more; this makes one: "
                "python -c 'import secrets; print(secrets.token_urlsafe())'"
            )
        if self.rate < 0 or self.body < 1 or self.timeout <= 0:
            raise UserError("--rate must be 0 or more, --body and --timeout above 0")


class Rates:
    """Token buckets, one a caller.

    >>> rates = Rates(2.0, clock=iter([0.0, 0.0, 0.0, 0.0, 0.0, 1.0]).__next__)
    >>> [rates.wait("ann") for _ in range(6)]
    [0.0, 0.0, 0.0, 0.0, 0.5, 0.0]
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.clock = rate, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, caller: str) -> float:
        """Take one; 0, or the seconds until there is one."""
        if not self.rate:
            return 0.0
        now, most = self.clock(), max(1.0, 2 * self.rate)
        left, since = self._left.pop(caller, (most, now))
        left = min(most, left + (now - since) * self.rate)
        served = left >= 1
        self._left[caller] = (left - served, now)
        if len(self._left) > ADDRESSES:
            self._left.popitem(last=False)
        return 0.0 if served else (1 - left) / self.rate
