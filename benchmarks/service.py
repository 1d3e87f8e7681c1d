"""``python -m benchmarks.service``: requests a second and their times, by real sockets on this machine.

Starts `fedbn serve`'s application in a process of its own on a free port of the loopback, with an untrained network of
the sensor scenarios' kind (weights do not change the cost), enrolls users, and sends single windows of users drawn at
random over a bounded number of connections, each of which waits for its answer: raw float32 (``binary``), JSON with
four decimals (``json``), or raw frames over WebSockets, each of one user (``socket``). The client shares the cores with
the service.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import multiprocessing
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast
from urllib.request import urlopen

import numpy as np

from simulations.report.documents import replace_block

SHAPE = (6, 128)
CLASSES = 6


def serve(listening: socket.socket) -> None:
    """The service; ends when it is told to."""
    from fedbn.models import build
    from fedbn.online import SQLiteStore
    from simulations.service.access import Access
    from simulations.service.api import create
    from simulations.service.server import run
    from simulations.service.users import Limits, UserStore

    model = build("har-cnn", SHAPE, CLASSES, seed=0).eval()
    with tempfile.TemporaryDirectory() as folder:
        store = SQLiteStore(Path(folder) / "users.db")
        users = UserStore(model, SHAPE, [f"class {i}" for i in range(CLASSES)], store=store, limits=Limits(20_000))
        access = Access(rate=0)  # all users share one address here
        run(create(users, access), access, listening)


class Connection(asyncio.Protocol):
    """HTTP/1.1 kept alive, one request at a time: little enough that the client does not set the figure."""

    def __init__(self) -> None:
        self.buffer = b""
        self.waiting: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Resolve the request when its answer is whole."""
        self.buffer += data
        status = self.status()
        if status is not None and self.waiting is not None:
            future, self.waiting, self.buffer = self.waiting, None, b""
            future.set_result(status)

    def status(self) -> int | None:
        """Of the answer in the buffer; None while it is not whole."""
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = self.buffer[:end].lower()
        at = head.find(b"content-length: ")
        length = int(head[at + 16 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        return int(self.buffer[9:12]) if len(self.buffer) >= end + 4 + length else None

    def connection_lost(self, error: Exception | None) -> None:
        """A request under way fails."""
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_exception(ConnectionError("the service closed the connection"))

    def ask(self, request: bytes) -> Awaitable[int]:
        """Status of one request."""
        self.waiting = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.waiting


class Socket(Connection):
    """A WebSocket (RFC 6455) once the first answer, 101, is there; frames come unmasked and whole."""

    open = False

    def status(self) -> int | None:
        """1000 for a frame with an answer, 1001 for one with an error, else as for HTTP."""
        if not self.open:
            found = super().status()
            self.open = found == 101
            return found
        if len(self.buffer) < 4:
            return None
        length, start = self.buffer[1], 2
        if length == 126:
            length, start = int.from_bytes(self.buffer[2:4], "big"), 4
        if len(self.buffer) < start + length:
            return None
        return 1000 if b'"answers"' in self.buffer[start:] else 1001


def upgrade(user: str) -> bytes:
    """The request that makes a connection a WebSocket."""
    key = base64.b64encode(os.urandom(16)).decode()
    about = f"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: {key}"
    return f"GET /v1/users/{user}/stream HTTP/1.1\r\nhost: localhost\r\n{about}\r\n\r\n".encode()


def frame(payload: bytes) -> bytes:
    """A binary frame of 126 to 65,535 bytes, masked, as clients must, by zeros, which change nothing."""
    return b"\x82" + bytes([0x80 | 126]) + len(payload).to_bytes(2, "big") + bytes(4) + payload


def request(method: str, path: str, body: bytes = b"", kind: str = "") -> bytes:
    """One request as bytes."""
    about = f"content-type: {kind}\r\ncontent-length: {len(body)}\r\n" if kind else "content-length: 0\r\n"
    accept = "accept: application/octet-stream\r\n" if kind.endswith("stream") else ""
    return f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n{about}{accept}\r\n".encode() + body


async def load(port: int, users: int, connections: int, seconds: float, form: str, most: int) -> dict[str, Any]:
    """Ask as fast as answers come; rates and times."""
    loop = asyncio.get_running_loop()
    socket_ = form == "socket"
    open_: list[Connection] = []
    for _ in range(connections):
        _, protocol = await loop.create_connection(Socket if socket_ else Connection, "127.0.0.1", port)
        open_.append(protocol)
    draw = np.random.default_rng(0)
    windows = draw.standard_normal((32, *SHAPE)).astype("<f4")
    if form == "json":
        bodies = [json.dumps({"windows": np.round(w.astype(float), 4).tolist()}).encode() for w in windows[:, None]]
    else:
        bodies = [w.tobytes() for w in windows]
    kind = "application/json" if form == "json" else "application/octet-stream"
    for i in range(users):
        await open_[i % connections].ask(request("PUT", f"/v1/users/user{i}"))
    for i, connection in enumerate(open_ if socket_ else ()):
        if await connection.ask(upgrade(f"user{i % users}")) != 101:
            raise ConnectionError("the service opened no WebSocket")
    times: list[float] = []
    statuses: dict[int, int] = {}
    end = 0.0

    async def client(number: int, connection: Connection) -> None:
        chance = random.Random(number)
        while len(times) < most:
            user, body = chance.randrange(users), bodies[chance.randrange(len(bodies))]
            began = time.perf_counter()
            if began > end:
                return
            asked = frame(body) if socket_ else request("POST", f"/v1/users/user{user}/observe", body, kind)
            status = await connection.ask(asked)
            times.append(time.perf_counter() - began)
            statuses[status] = statuses.get(status, 0) + 1

    end = time.perf_counter() + min(2.0, seconds / 4)
    await asyncio.gather(*(client(-i, c) for i, c in enumerate(open_)))  # warm up
    times.clear()
    statuses.clear()
    spent, own = processor_seconds(port), time.process_time()
    began = time.perf_counter()
    end = began + seconds
    await asyncio.gather(*(client(i, c) for i, c in enumerate(open_)))
    took = time.perf_counter() - began
    own, spent = time.process_time() - own, processor_seconds(port) - spent
    for connection in open_:
        connection.transport.close()
    marks = statistics.quantiles(times, n=100)
    return {
        "form": form,
        "users": users,
        "connections": connections,
        "requests": len(times),
        "requests_a_second": round(len(times) / took, 1),
        "ms_p50": round(1e3 * marks[49], 2),
        "ms_p99": round(1e3 * marks[98], 2),
        "service_cpu_us_a_request": round(1e6 * spent / len(times), 1),
        "client_cpu_us_a_request": round(1e6 * own / len(times), 1),
        "statuses": {str(k): v for k, v in sorted(statuses.items())},
    }


def free_socket() -> socket.socket:
    """A socket that listens on a free port of the loopback."""
    return socket.create_server(("127.0.0.1", 0), backlog=2048)


def processor_seconds(port: int) -> float:
    """Processor time of the service so far, by its own metrics."""
    with urlopen(f"http://localhost:{port}/metrics") as page:
        text = page.read().decode()
    return float(text.split("\nprocess_cpu_seconds_total ")[1].split("\n", 1)[0])


def until_ready(port: int, seconds: float = 60.0) -> None:
    """Wait until the service answers.

    Raises:
        TimeoutError: it does not.
    """
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.settimeout(2)
                connection.sendall(request("GET", "/health"))
                if b"200" in connection.recv(64):
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise TimeoutError("the service did not start")


def measure(users: int, connections: int, seconds: float, forms: list[str], most: int = 200_000) -> dict[str, Any]:
    """Figures of each form of request, and what the machine was busy with beside.

    Args:
        users: enrolled.
        connections: open at once.
        seconds: of measurement for each form.
        forms: ``binary``, ``json``, ``socket``.
        most: requests for each form.
    """
    run: Callable[..., Any] = asyncio.run
    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        pass
    with free_socket() as listening:
        port = listening.getsockname()[1]
        service = multiprocessing.get_context("spawn").Process(target=serve, args=(listening,))
        service.start()
        try:
            until_ready(port)
            before = os.getloadavg()[0]
            rows = [run(load(port, users, connections, seconds, form, most)) for form in forms]
        finally:
            service.terminate()
            service.join(10)
            service.kill()
    return {"cores": os.cpu_count(), "load_before": before, "load_after": os.getloadavg()[0], "rows": rows}


def main() -> int:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--connections", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=8.0, help="of measurement for each form")
    parser.add_argument("--forms", default="binary,json,socket", help="comma-separated, of binary, json and socket")
    parser.add_argument("--into", type=Path, help="also put the figures into this document, between its markers")
    chosen = parser.parse_args()
    found = measure(chosen.users, chosen.connections, chosen.seconds, chosen.forms.split(","))
    print(json.dumps(found, indent=1))
    if chosen.into:
        replace_block(chosen.into, "load", as_markdown(found))
    return 0


def as_markdown(found: dict[str, Any]) -> str:
    """The figures of `measure` as a table, with what the machine was."""
    columns = ("form", "connections", "requests", "requests_a_second", "ms_p50", "ms_p99", "service_cpu_us_a_request")
    head = [c.replace("_", " ") for c in columns]
    lines = [head, ["---"] * len(head), *([f"{row[c]}" for c in columns] for row in found["rows"])]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    busy = f"load average {found['load_before']:.1f} before and {found['load_after']:.1f} after"
    users = found["rows"][0]["users"]
    return f"{table}\n\n{users} users, {found['cores']} cores shared with the client and whatever else ran: {busy}.\n"


if __name__ == "__main__":
    raise SystemExit(main())
