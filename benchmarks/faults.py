"""``python -m benchmarks.faults``: kill the service under writes, and compare what it has stored with what it promised.

The service runs in a separate process on one store, which all tries share. Several connections send changes without
pause: windows, resets, new users and deletions. After a random time the process gets SIGKILL, the service starts again,
and every user is compared with the last change that was acknowledged. The change in flight may or may not be stored.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import multiprocessing
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.service import CLASSES, SHAPE, free_socket, wait_until_ready
from simulations.results.formatting import markdown_table

CONNECTIONS = 4
USERS_PER_CONNECTION = 8
SECONDS = (0.2, 1.2)
"""Shortest and longest time between two kills."""

Log = Callable[[str], None]


def serve(listening: socket.socket, file: Path) -> None:
    """Run the service until the process is killed."""
    logging.disable(logging.WARNING)
    from fedbn.models import build
    from fedbn.online import SQLiteStore
    from simulations.service.access import Access
    from simulations.service.api import create_app
    from simulations.service.server import run
    from simulations.service.users import Limits, UserStore

    model = build("har-cnn", SHAPE, CLASSES, seed=0).eval()
    names = [f"class {i}" for i in range(CLASSES)]
    # Fewer users in memory than there are, so that users are also reloaded from the store.
    limits = Limits(capacity=CONNECTIONS * USERS_PER_CONNECTION // 2)
    users = UserStore(model, SHAPE, names, store=SQLiteStore(file), limits=limits)
    access = Access(rate=0, user_rate=0)
    run(create_app(users, access), access, listening)


class Writer:
    """Sends changes of its own users over one connection, and records what was acknowledged.

    Attributes:
        possible: per user, the numbers of learned windows that the store may have; None: no such user.
        acknowledged: number of acknowledged changes.
    """

    def __init__(self, number: int, draw: random.Random) -> None:
        self.draw, self.acknowledged = draw, 0
        self.possible: dict[str, set[int | None]] = {f"user{number}-{i}": {None} for i in range(USERS_PER_CONNECTION)}
        window = np.random.default_rng(number).standard_normal((1, *SHAPE)).astype("<f4")
        self._window = window.tobytes()

    def write(self, port: int) -> None:
        """Send changes until the connection is lost."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        while True:
            user = self.draw.choice(list(self.possible))
            (count,) = self.possible[user]
            method, path, after = self._change(count)
            self.possible[user] = {count, after}
            try:
                body = self._window if path == "/observe" else None
                headers = {"content-type": "application/octet-stream"}
                connection.request(method, f"/v1/users/{user}{path}", body, headers)
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException):
                return
            if not 200 <= response.status < 300:
                raise RuntimeError(f"{method} {path} got status {response.status}")
            self.possible[user] = {after}
            self.acknowledged += 1

    def _change(self, count: int | None) -> tuple[str, str, int | None]:
        """Method, path and number of learned windows after a change."""
        if count is None:
            return "PUT", "", 0
        kind = self.draw.random()
        if kind < 0.05:
            return "DELETE", "", None
        if kind < 0.1:
            return "POST", "/reset", 0
        return "POST", "/observe", count + 1

    def compare(self, port: int) -> list[str]:
        """Users whose state is none of the possible ones. What was found is possible from now on."""
        wrong = []
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        for user, possible in self.possible.items():
            connection.request("GET", f"/v1/users/{user}")
            response = connection.getresponse()
            report = json.loads(response.read())
            found = None if response.status == 404 else int(report.get("learned", -1))
            if found not in possible:
                wrong.append(f"{user} has {found} windows instead of {sorted(map(str, possible))}")
            self.possible[user] = {found}
        return wrong


@contextmanager
def running(file: Path) -> Any:
    """A service in a separate process: the process and its port. It is killed at the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simulations.service.api", "simulations.service.server", "fedbn.models"])
    with free_socket() as listening:
        port = listening.getsockname()[1]
        process = context.Process(target=serve, args=(listening, file))
        process.start()
        listening.close()
        try:
            wait_until_ready(port)
            yield process, port
        finally:
            process.kill()
            process.join()


def service_kills(tries: int, folder: Path, seed: int = 0, log: Log = lambda text: None) -> dict[str, Any]:
    """Kill the service under writes.

    Args:
        tries: number of kills.
        folder: directory of the store.
        seed: of the changes and of the times of the kills.
        log: called with a message after each kill.

    Returns:
        Row of the table of faults: ``kind``, ``tries``, ``lost or wrong`` (users, over all tries), and the number of
        changes that were ``acknowledged``.
    """
    draw, wrong = random.Random(seed), []
    writers = [Writer(number, random.Random(f"{seed} {number}")) for number in range(CONNECTIONS)]
    for turn in range(tries + 1):
        with running(folder / "users.db") as (process, port):
            wrong += [text for writer in writers for text in writer.compare(port)]
            if turn == tries:
                break
            threads = [threading.Thread(target=writer.write, args=(port,)) for writer in writers]
            for thread in threads:
                thread.start()
            time.sleep(draw.uniform(*SECONDS))
            process.kill()
            for thread in threads:
                thread.join()
        acknowledged = sum(writer.acknowledged for writer in writers)
        log(f"kill {turn + 1} of {tries}: {acknowledged} changes acknowledged, {len(wrong)} users lost or wrong")
    for text in wrong:
        log(text)
    return {
        "kind": "kill -9 of the service under writes",
        "tries": tries,
        "lost or wrong": len(wrong),
        "acknowledged": sum(writer.acknowledged for writer in writers),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of faults. Returns 1 if anything was lost or wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="kills of the service")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        rows = [service_kills(args.kills, Path(name), log=lambda text: print(text, flush=True))]
    print(markdown_table([{name: str(value) for name, value in row.items()} for row in rows]))
    return int(any(row["lost or wrong"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
