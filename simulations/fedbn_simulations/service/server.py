"""Run the application on a socket until it is interrupted."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType

import torch
import uvicorn
from starlette.types import ASGIApp

from fedbn.errors import UserError
from fedbn_simulations.service.access import Access
from fedbn_simulations.service.connections import limited_protocol

KEEP_ALIVE = 75
"""Seconds after which an idle connection is closed."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Port 0 selects a free port.

    Raises:
        UserError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror}): choose another --port, or 0 for a free one"
        ) from None


def address(host: str, listening: socket.socket, *, tls: bool = False) -> str:
    """The URL of the service.

    >>> with listen("127.0.0.1", 0) as free: address("127.0.0.1", free).startswith("http://127.0.0.1:")
    True
    """
    name = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{name}:{listening.getsockname()[1]}"


def create_server(app: ASGIApp, access: Access, on_ready: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """Create a server without starting it; arguments as for `run`."""
    config = uvicorn.Config(
        app,
        http=limited_protocol(),
        ssl_certfile=access.cert,
        ssl_keyfile=access.key,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=5,
        ws="websockets-sansio",
        ws_max_size=access.body,
        ws_max_queue=4,
        ws_per_message_deflate=False,
    )
    return _Server(config, on_ready)


def run(app: ASGIApp, access: Access, listening: socket.socket, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGINT or SIGTERM, then answer queued requests and save changed users.

    Args:
        app: of `fedbn_simulations.service.api.create_app`.
        access: its limits.
        listening: of `listen`.
        on_ready: is called before the first request.
    """
    torch.set_num_threads(1)  # batches are small, and the network needs the other core
    try:
        create_server(app, access, on_ready).run(sockets=[listening])
    except KeyboardInterrupt:
        return


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_ready = on_ready

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # By default a second signal exits before the users are saved. Shutdown is fast enough without it.
        self._captured_signals.append(sig)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_ready()
