"""A server that waits for more nodes than a simulation has ends with one sentence; in Flower it waits forever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.server.client_manager import SimpleClientManager

from fedbn.errors import UserError

WAIT_SECONDS = 3.0
"""Seconds in which a server asks for the nodes again and again before it counts as waiting."""

MIN_CALLS = 4
"""Least number of questions; Flower's strategies ask once a second."""


class NodeWait:
    """Notices that the server's thread does nothing but ask for the nodes, whose number is fixed."""

    def __init__(self, nodes: int) -> None:
        """Belong to the current thread; Flower's former servers ask in another thread all the time."""
        self._nodes, self._thread = nodes, threading.get_ident()
        self.reset()

    def reset(self) -> None:
        """The server has sent or received messages."""
        self._calls, self._start = 0, time.monotonic()

    def ask(self) -> None:
        """The server asks for the nodes.

        Raises:
            UserError: it waits.
        """
        if threading.get_ident() != self._thread:
            return
        if self._calls == 0:
            self._start = time.monotonic()
        self._calls += 1
        if self._calls >= MIN_CALLS and time.monotonic() - self._start >= WAIT_SECONDS:
            raise too_few(self._nodes)


@contextmanager
def former_servers_do_not_wait(nodes: int) -> Iterator[None]:
    """In this context, the client manager of Flower's former servers fails where it would wait forever.

    Raises:
        UserError: a server waits for more clients than there are nodes.
    """
    original = SimpleClientManager.wait_for

    def wait_for(self: SimpleClientManager, num_clients: int, timeout: int = 86400) -> bool:
        if num_clients > nodes and timeout > WAIT_SECONDS:
            raise too_few(nodes)
        return original(self, num_clients, timeout)

    SimpleClientManager.wait_for = wait_for  # type: ignore[method-assign]
    try:
        yield
    finally:
        SimpleClientManager.wait_for = original  # type: ignore[method-assign]


def too_few(nodes: int) -> UserError:
    """The server waits for more nodes than there are."""
    return UserError(
        f"the server waits for more than the {nodes} nodes of this simulation: raise --num-supernodes "
        "(num_supernodes), or lower min_available_nodes of its strategy (min_available_clients in the former interface)"
    )
