"""Limits of connections that uvicorn does not have: their number, and the time and size of request headers."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.auto import AutoHTTPProtocol

MAX_CONNECTIONS = 8192
"""Largest number of open connections; further ones get status 503."""

RESERVED_FILES = 64
"""File descriptors that are not used for connections."""

HEADER_SECONDS = 10.0
"""Seconds from the first byte of a request, or the opening of a connection, to the end of the request's headers."""

HEADER_BYTES = 65_536
"""Largest number of bytes that may arrive before the end of a request's headers."""

BUSY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
LATE = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def connection_limit() -> int:
    """Number of connections that the limit of file descriptors permits, at most `MAX_CONNECTIONS`."""
    try:
        import resource
    except ImportError:  # Windows
        return MAX_CONNECTIONS
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, files - RESERVED_FILES))


class LimitedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's HTTP protocol with limits.

    Attributes:
        max_connections: number of connections from which on new ones are refused.
    """

    max_connections = MAX_CONNECTIONS

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Refuse the connection if there are too many."""
        self._deadline: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._refused = len(self.connections) >= self.max_connections
        if self._refused:
            self._refuse(cast(asyncio.Transport, transport), BUSY)
            return
        super().connection_made(transport)
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_deadline()
        if not self._refused:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Receive data; check time and size while headers are incomplete."""
        if self._refused:
            return
        super().data_received(data)
        if self._in_request():
            self._stop_deadline()
        elif not self.transport.is_closing() and self.transport.get_protocol() is self:
            self._header_bytes += len(data)
            if self._header_bytes > HEADER_BYTES:
                self._refuse(self.transport, LARGE)
            elif self._deadline is None:
                self._start_deadline()

    def eof_received(self) -> Any:
        """The client has closed its side."""
        return None if self._refused else super().eof_received()

    def handle_websocket_upgrade(self, *args: Any) -> None:
        """Hand the connection to the WebSocket protocol."""
        self._stop_deadline()
        super().handle_websocket_upgrade(*args)

    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_deadline(self) -> None:
        self._deadline = asyncio.get_running_loop().call_later(HEADER_SECONDS, self._expire)

    def _stop_deadline(self) -> None:
        self._header_bytes = 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        if not self._in_request() and not self.transport.is_closing():
            self._refuse(self.transport, LATE)

    def _refuse(self, transport: asyncio.Transport, response: bytes) -> None:
        transport.write(response)
        transport.close()


def limited_protocol(limit: int | None = None) -> type[LimitedProtocol]:
    """The protocol with a limit of connections; None: `connection_limit`."""

    class Protocol(LimitedProtocol):
        max_connections = limit or connection_limit()

    return Protocol
