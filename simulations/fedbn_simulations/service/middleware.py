"""ASGI middleware for authentication, size and rate limits, timeouts, metrics and access logs."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import unicodedata
from functools import lru_cache
from urllib.parse import unquote_to_bytes, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedbn.errors import UserError
from fedbn.online.stores import StoreError
from fedbn_simulations.service.access import (
    LOOPBACK,
    PUBLIC_PATHS,
    TOKEN_BURST,
    WRONG_TOKENS,
    Access,
    RateLimiter,
)
from fedbn_simulations.service.observability import Metrics
from fedbn_simulations.service.schema import RequestError

LOG = logging.getLogger("fedbn.service")


class AccessMiddleware:
    """ASGI middleware.

    Args:
        app: wrapped application.
        access: authentication and limits.
        metrics: request counters.
    """

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self.app, self.access, self.metrics = app, access, metrics
        self.limiter = RateLimiter(access.rate)
        self.wrong_tokens = RateLimiter(WRONG_TOKENS if access.rate else 0.0, TOKEN_BURST)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle or reject a request."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._socket(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        status = 0

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            async with asyncio.timeout(self.access.timeout):
                await self.app(scope, self._limit_body(scope, receive), record_status)
        except UserError as error:
            await self._reject(as_request_error(error), record_status)
        except TimeoutError:
            if status:
                raise
            text = f"no answer within {self.access.timeout:g} s: send fewer windows; they may have been learned already"
            await self._reject(RequestError(504, text, retry_after=1), record_status)
        except Exception:
            if status:
                raise
            LOG.exception("request failed")
            await self._reject(RequestError(500, "internal error; see the log of the service"), record_status)
        finally:
            seconds = time.perf_counter() - start
            self.metrics.requests.labels(scope["method"], str(status)).inc()
            self.metrics.seconds.observe(seconds)
            level = logging.DEBUG if status < 400 else logging.WARNING if status < 500 else logging.ERROR
            if LOG.isEnabledFor(level):
                fields = {"method": scope["method"], "path": scope["path"], "status": status}
                fields |= {"ms": round(1e3 * seconds, 2), "caller": caller(scope)}
                LOG.log(level, "request", extra={"fields": fields})

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
        except RequestError as error:
            LOG.warning("socket rejected", extra={"fields": {"path": scope["path"], "reason": str(error)}})
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": str(error)[:120]})
            return

        async def rate_limited() -> Message:
            message = await receive()
            if message["type"] == "websocket.receive":
                self.metrics.frames.inc()
                while wait := self.limiter.acquire(caller(scope)):
                    await asyncio.sleep(wait)
            return message

        try:
            await self.app(scope, rate_limited, send)
        except Exception:
            LOG.exception("socket failed")
            await send({"type": "websocket.close", "code": 1011, "reason": "internal error"})

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        name = _hostname(host)
        # Other web pages must not reach a local service through the user's browser.
        if self.access.host in LOOPBACK and name not in LOOPBACK:
            raise RequestError(421, f"this service accepts requests for localhost only, not for {name!r}")
        origin = headers.get(b"origin")
        if origin is not None and _netloc(origin.decode("latin-1")) != host:
            raise RequestError(403, "requests from pages of another origin are rejected")
        address = caller(scope)
        if wait := self.limiter.acquire(address):
            raise RequestError(429, f"more than {self.access.rate:g} requests per second: try again later", wait)
        if self.access.token and scope["path"] not in PUBLIC_PATHS:
            # Before the token is compared, so that guesses above the limit are useless even if one is right.
            if wait := self.wrong_tokens.blocked(address):
                raise RequestError(429, "too many requests with a wrong token: try again later", wait)
            expected = f"Bearer {self.access.token}".encode()
            if not hmac.compare_digest(headers.get(b"authorization", b""), expected):
                self.wrong_tokens.acquire(address)
                raise RequestError(401, "send the header 'Authorization: Bearer TOKEN'")
        _decode_path(scope)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.access.body:
            raise self._too_large()

    def _too_large(self) -> RequestError:
        return RequestError(413, f"the body exceeds {self.access.body} bytes: send fewer windows per request")

    def _limit_body(self, scope: Scope, receive: Receive) -> Receive:
        """Count the bytes of bodies without a content length."""
        if any(name == b"content-length" for name, _ in scope["headers"]):
            return receive
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.access.body:
                raise self._too_large()
            return message

        return counted

    async def _reject(self, error: RequestError, send: Send) -> None:
        body = json.dumps({"error": str(error)}).encode()
        headers = [(k.encode(), v.encode()) for k, v in error_headers(error).items()]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def as_request_error(error: UserError) -> RequestError:
    """Convert errors of the library to errors with a status.

    Errors of the store get 507 if the disk is full, else 503, without details, which the log has. All others get 409:
    they are conflicts with the user's state.
    """
    if isinstance(error, StoreError):
        if error.full:
            return RequestError(507, "the disk of the service is full: changes cannot be saved", retry_after=10)
        return RequestError(503, "the store of the service is not available: try again later", retry_after=1)
    return error if isinstance(error, RequestError) else RequestError(409, str(error))


def error_headers(error: RequestError) -> dict[str, str]:
    """Response headers for an error.

    >>> error_headers(RequestError(429, "wait", retry_after=0.2))
    {'retry-after': '1'}
    """
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    return {} if error.retry_after is None else {"retry-after": str(max(1, round(error.retry_after)))}


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


@lru_cache(256)
def _hostname(host: str) -> str:
    """Host name of the header ``host``, which is the same for most requests; empty if it is not valid."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _decode_path(scope: Scope) -> None:
    """Set the path to its canonical form: UTF-8 in Unicode's normal form C, as names of users are compared.

    Raises:
        RequestError: the path is not UTF-8, or the query has other characters than ASCII.
    """
    if not scope["query_string"].isascii():
        raise RequestError(400, "the query has characters that are not ASCII: encode them as UTF-8, then as %XX")
    if scope["path"].isascii():
        return
    try:
        path = unquote_to_bytes(scope["raw_path"]).decode() if scope.get("raw_path") else scope["path"]
    except UnicodeDecodeError:
        raise RequestError(400, "the path is not UTF-8: encode it as UTF-8, then as %XX") from None
    scope["path"] = unicodedata.normalize("NFC", path)


def caller(scope: Scope) -> str:
    """Address that a request comes from."""
    return str((scope.get("client") or ("local",))[0])
