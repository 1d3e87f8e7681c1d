"""Around every request: who may ask, how much and how often, how long it may take; counted, timed and logged."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedbn.errors import UserError
from simulations.service.access import LOOPBACK, OPEN, Access, Rates
from simulations.service.observability import Metrics
from simulations.service.schema import Refusal

LOG = logging.getLogger("fedbn.service")


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
