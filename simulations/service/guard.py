"""Around every request: who may ask, how much and how often, how long it may take; counted, timed and logged."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedbn.errors import UserError
from simulations.service.batching import Batcher
from simulations.service.people import People
from simulations.service.wire import Refusal

LOG = logging.getLogger("fedbn.service")

ADDRESSES = 10_000
"""Callers whose rate is remembered; who was not heard for longest is forgotten."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")

OPEN = ("/health",)
"""Paths that need no token."""

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


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


class Metrics:
    """Counters of one service, for Prometheus."""

    def __init__(self, people: People, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        more: dict[str, Any] = {"registry": self.registry}
        ProcessCollector(**more)
        self.requests = Counter("fedbn_requests", "Requests by kind and status", ["method", "status"], **more)
        self.seconds = Histogram("fedbn_request_seconds", "Time to answer", buckets=BUCKETS, **more)
        self.frames = Counter("fedbn_frames", "Frames received on sockets", **more)
        gauges: dict[tuple[str, str], Callable[[], float]] = {
            ("fedbn_users_at_hand", "Users in memory"): lambda: people.at_hand,
            ("fedbn_windows_waiting", "Windows in the queue"): lambda: batcher.waiting,
            ("fedbn_bank_calls", "Calls of the bank"): lambda: batcher.calls,
            ("fedbn_windows", "Windows answered"): lambda: batcher.done,
            ("fedbn_drift_alarms", "Alarms of drift detectors"): lambda: people.watches.spoken,
        }
        for (name, about), value in gauges.items():
            Gauge(name, about, **more).set_function(value)


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


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        access: who may ask, and how much.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self.app, self.access, self.metrics = app, access, metrics
        self.rates = Rates(access.rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, or refuse."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._socket(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._admit(scope)
            async with asyncio.timeout(self.access.timeout):
                await self.app(scope, self._measured(scope, receive), noting)
        except UserError as error:
            await self._refuse(refusal_of(error), noting)
        except TimeoutError:
            if status:
                raise
            text = f"no answer within {self.access.timeout:g} s: send less at once; what was sent may have been learnt"
            await self._refuse(Refusal(504, text, wait=1), noting)
        except Exception:
            if status:
                raise
            LOG.exception("request failed")
            await self._refuse(Refusal(500, "the service made a mistake; its log says more"), noting)
        finally:
            took = time.perf_counter() - began
            self.metrics.requests.labels(scope["method"], str(status)).inc()
            self.metrics.seconds.observe(took)
            level = logging.DEBUG if status < 400 else logging.WARNING if status < 500 else logging.ERROR
            if LOG.isEnabledFor(level):
                about = {"method": scope["method"], "path": scope["path"], "status": status, "ms": round(1e3 * took, 2)}
                LOG.log(level, "request", extra={"about": about | {"caller": _caller(scope)}})

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._admit(scope)
        except Refusal as refusal:
            LOG.warning("socket refused", extra={"about": {"path": scope["path"], "why": str(refusal)}})
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": str(refusal)[:120]})
            return

        async def paced() -> Message:
            message = await receive()
            if message["type"] == "websocket.receive":
                self.metrics.frames.inc()
                while wait := self.rates.wait(_caller(scope)):
                    await asyncio.sleep(wait)
            return message

        await self.app(scope, paced, send)

    def _admit(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        name = _hostname(host)
        # A page elsewhere must not reach a service on this machine through the browser of whoever reads it.
        if self.access.host in LOOPBACK and name not in LOOPBACK:
            raise Refusal(421, f"this service answers for localhost, not for {name!r}")
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc != host:
            raise Refusal(403, "requests from pages of another origin are not served")
        if self.access.token and scope["path"] not in OPEN:
            expected = f"Bearer {self.access.token}".encode()
            if not hmac.compare_digest(headers.get(b"authorization", b""), expected):
                raise Refusal(401, "send the header 'Authorization: Bearer TOKEN'")
        if wait := self.rates.wait(_caller(scope)):
            raise Refusal(429, f"more than {self.access.rate:g} requests a second: wait a little", wait)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.access.body:
            raise self._too_large()

    def _too_large(self) -> Refusal:
        return Refusal(413, f"a body may have {self.access.body} bytes: send fewer windows at once")

    def _measured(self, scope: Scope, receive: Receive) -> Receive:
        """Bodies without a stated length are counted as they come."""
        if any(name == b"content-length" for name, _ in scope["headers"]):
            return receive
        met = 0

        async def counted() -> Message:
            nonlocal met
            message = await receive()
            met += len(message.get("body", b""))
            if met > self.access.body:
                raise self._too_large()
            return message

        return counted

    async def _refuse(self, refusal: Refusal, send: Send) -> None:
        body = json.dumps({"error": str(refusal)}).encode()
        headers = [(k.encode(), v.encode()) for k, v in extra(refusal).items()]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def refusal_of(error: UserError) -> Refusal:
    """Mistakes that the library finds are conflicts with what is known of a user."""
    return error if isinstance(error, Refusal) else Refusal(409, str(error))


def extra(refusal: Refusal) -> dict[str, str]:
    """Headers that belong to a refusal.

    >>> extra(Refusal(429, "wait", wait=0.2))
    {'retry-after': '1'}
    """
    if refusal.status == 401:
        return {"www-authenticate": "Bearer"}
    return {} if refusal.wait is None else {"retry-after": str(max(1, round(refusal.wait)))}


@lru_cache(256)
def _hostname(host: str) -> str:
    """Of the header ``host``, which most requests have alike."""
    return urlsplit(f"//{host}").hostname or ""


def _caller(scope: Scope) -> str:
    return str((scope.get("client") or ("local",))[0])


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and what the caller says about it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "about", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(verbose: bool) -> None:
    """Structured logs of the service and of its server; with ``verbose`` every request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("fedbn.service", logging.DEBUG if verbose else logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
