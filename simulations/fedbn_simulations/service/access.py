"""Access control and rate limits of the service."""

from __future__ import annotations

import ssl
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedbn.errors import UserError

MAX_CALLERS = 10_000
"""Callers whose rate is tracked. The least recently seen one is evicted."""

WRONG_TOKENS = 1.0
"""Requests with a wrong token per second and address, with bursts of `TOKEN_BURST`. An address above it is refused."""

TOKEN_BURST = 10

USER_BURST = 256
"""Windows that a user may send at once, whatever the rate; a whole request."""

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
        user_rate: windows per second and user, with bursts of twice as many, or of a whole request. 0 means unlimited.
        cert: file with the certificate chain for TLS, in PEM format; None: no TLS.
        key: file with its private key; None: the key is in ``cert``.

    Raises:
        UserError: the address is open to others without a token, a limit is out of range, or the certificate cannot be
            used.
    """

    host: str = "127.0.0.1"
    token: str = ""
    rate: float = 500.0
    body: int = 4_000_000
    timeout: float = 10.0
    user_rate: float = 100.0
    cert: Path | None = None
    key: Path | None = None

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
        if not (self.rate >= 0 and self.user_rate >= 0 and self.body >= 1 and self.timeout > 0):
            raise UserError("--rate and --user-rate must be 0 or more, --body and --timeout above 0")
        if self.key is not None and self.cert is None:
            raise UserError("--tls-key needs the certificate, --tls-cert")
        if self.cert is not None:
            self._check_certificate(self.cert)

    def _check_certificate(self, cert: Path) -> None:
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(cert, self.key, password="")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise UserError(
                f"--tls-cert {cert} and --tls-key cannot be used ({error}): give a certificate in PEM format and "
                "its key, without a passphrase"
            ) from None


class RateLimiter:
    """Token bucket per caller.

    Args:
        rate: tokens per second; 0 means unlimited.
        burst: capacity of a bucket; default: twice the rate, at least 1.
        clock: seconds.

    >>> limiter = RateLimiter(2.0, clock=iter([0.0, 0.0, 0.0, 0.0, 0.0, 1.0]).__next__)
    >>> [limiter.acquire("ann") for _ in range(6)]
    [0.0, 0.0, 0.0, 0.0, 0.5, 0.0]
    """

    def __init__(self, rate: float, burst: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.clock = rate, clock
        self.burst = max(1.0, 2 * rate) if burst is None else burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def acquire(self, caller: str, number: float = 1) -> float:
        """Take tokens: 0 on success, otherwise the seconds until there are enough, and none is taken."""
        if not self.rate:
            return 0.0
        tokens, now = self._tokens(caller)
        acquired = tokens >= number
        self._buckets[caller] = (tokens - number * acquired, now)
        self._buckets.move_to_end(caller)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        return 0.0 if acquired else (number - tokens) / self.rate

    def blocked(self, caller: str) -> float:
        """Seconds until the caller has a token; 0 if it has one."""
        return max(0.0, 1 - self._tokens(caller)[0]) / self.rate if self.rate else 0.0

    def _tokens(self, caller: str) -> tuple[float, float]:
        now = self.clock()
        tokens, since = self._buckets.get(caller, (self.burst, now))
        return min(self.burst, tokens + (now - since) * self.rate), now
