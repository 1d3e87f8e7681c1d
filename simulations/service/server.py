"""Run the application on a socket until it is interrupted."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType

import torch
import uvicorn
from starlette.types import ASGIApp

from fedbn.errors import UserError
from simulations.service.access import Access

CONNECTIONS = 8192
"""Open at once; further ones are answered with 503."""

IDLE = 75
"""Seconds after which a connection without requests is closed."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: any that is free.

    Raises:
        UserError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror}): choose another --port, 0 takes any that is free"
        ) from None
    return found


def address(host: str, listening: socket.socket) -> str:
    """What to type into a browser.

    >>> with listen("127.0.0.1", 0) as free: address("127.0.0.1", free).startswith("http://127.0.0.1:")
    True
    """
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"


def server_of(app: ASGIApp, access: Access, ready: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """The server, not yet running; arguments as for `run`."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=5,
        ws="websockets-sansio",
        ws_max_size=access.body,
        ws_max_queue=4,
        ws_per_message_deflate=False,
    )
    return _Server(config, ready)


def run(app: ASGIApp, access: Access, listening: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGINT or SIGTERM; what waits is answered, what changed is written.

    Args:
        app: of `simulations.service.api.create`.
        access: its limits.
        listening: of `listen`.
        ready: called when requests are about to be answered.
    """
    torch.set_num_threads(1)  # batches are small, and the other core belongs to the network
    try:
        server_of(app, access, ready).run(sockets=[listening])
    except KeyboardInterrupt:
        return


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A second signal would leave before the users are written; the wait is short as it is.
        self._captured_signals.append(sig)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()
