"""``python -m benchmarks.service``: throughput and latency of the HTTP service over local sockets.

Starts the application of `fedbn serve` in a separate process on a free loopback port, with an untrained network of the
sensor scenarios (the weights do not change the cost). It enrolls users and sends single windows of random users over a
fixed number of connections. Each connection waits for its response. Windows are sent as raw float32 (``binary``), as
JSON with four decimals (``json``), or as raw WebSocket frames with one user per socket (``socket``). The load generator
shares the cores with the service.
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

from fedbn_simulations.report.documents import replace_block
from fedbn_simulations.results.formatting import markdown_table

SHAPE = (6, 128)
CLASSES = 6


def serve(listening: socket.socket) -> None:
    """Run the service until the process is terminated."""
    from fedbn.models import build
    from fedbn.online import SQLiteStore
    from fedbn_simulations.service.access import Access
    from fedbn_simulations.service.api import create_app
    from fedbn_simulations.service.server import run
    from fedbn_simulations.service.users import Limits, UserStore

    model = build("har-cnn", SHAPE, CLASSES, seed=0).eval()
    with tempfile.TemporaryDirectory() as folder:
        store = SQLiteStore(Path(folder) / "users.db")
        names = [f"class {i}" for i in range(CLASSES)]
        users = UserStore(model, SHAPE, names, "pseudo:n0=64", store=store, limits=Limits(20_000))
        access = Access(rate=0)  # all users share one address
        run(create_app(users, access), access, listening)


class Connection(asyncio.Protocol):
    """A minimal HTTP/1.1 keep-alive client, one request at a time, so that the client is not the bottleneck."""

    def __init__(self) -> None:
        self.buffer = b""
        self.pending: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Resolve the pending request when its response is complete."""
        self.buffer += data
        status = self.status()
        if status is not None and self.pending is not None:
            future, self.pending, self.buffer = self.pending, None, b""
            future.set_result(status)

    def status(self) -> int | None:
        """Status of the response in the buffer. None while it is incomplete."""
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = self.buffer[:end].lower()
        at = head.find(b"content-length: ")
        length = int(head[at + 16 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        return int(self.buffer[9:12]) if len(self.buffer) >= end + 4 + length else None

    def connection_lost(self, error: Exception | None) -> None:
        """Fail the pending request."""
        if self.pending is not None and not self.pending.done():
            self.pending.set_exception(ConnectionError("the service closed the connection"))

    def send(self, request: bytes) -> Awaitable[int]:
        """Send a request and return its status."""
        self.pending = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.pending


class Socket(Connection):
    """A WebSocket (RFC 6455) after the response 101. Server frames are unmasked and not fragmented."""

    open = False

    def status(self) -> int | None:
        """1000 for a frame with answers, 1001 for one with an error, otherwise the HTTP status."""
        if not self.open:
            status = super().status()
            self.open = status == 101
            return status
        if len(self.buffer) < 4:
            return None
        length, start = self.buffer[1], 2
        if length == 126:
            length, start = int.from_bytes(self.buffer[2:4], "big"), 4
        if len(self.buffer) < start + length:
            return None
        return 1000 if b'"answers"' in self.buffer[start:] else 1001


def upgrade(user: str) -> bytes:
    """The request that upgrades a connection to a WebSocket."""
    key = base64.b64encode(os.urandom(16)).decode()
    headers = f"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: {key}"
    return f"GET /v1/users/{user}/stream HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n\r\n".encode()


def frame(payload: bytes) -> bytes:
    """A binary frame of 126 to 65,535 bytes. Clients must mask frames; a mask of zeros changes nothing."""
    return b"\x82" + bytes([0x80 | 126]) + len(payload).to_bytes(2, "big") + bytes(4) + payload


def request(method: str, path: str, body: bytes = b"", kind: str = "") -> bytes:
    """An HTTP request as bytes."""
    headers = f"content-type: {kind}\r\ncontent-length: {len(body)}\r\n" if kind else "content-length: 0\r\n"
    accept = "accept: application/octet-stream\r\n" if kind.endswith("stream") else ""
    return f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n{headers}{accept}\r\n".encode() + body


async def load(port: int, users: int, connections: int, seconds: float, form: str, max_requests: int) -> dict[str, Any]:
    """Send requests as fast as responses arrive; returns rates and latencies."""
    loop = asyncio.get_running_loop()
    websocket = form == "socket"
    pool: list[Connection] = []
    for _ in range(connections):
        _, protocol = await loop.create_connection(Socket if websocket else Connection, "127.0.0.1", port)
        pool.append(protocol)
    rng = np.random.default_rng(0)
    windows = rng.standard_normal((32, *SHAPE)).astype("<f4")
    if form == "json":
        bodies = [json.dumps({"windows": np.round(w.astype(float), 4).tolist()}).encode() for w in windows[:, None]]
    else:
        bodies = [w.tobytes() for w in windows]
    kind = "application/json" if form == "json" else "application/octet-stream"
    for i in range(users):
        await pool[i % connections].send(request("PUT", f"/v1/users/user{i}"))
    for i, connection in enumerate(pool if websocket else ()):
        if await connection.send(upgrade(f"user{i % users}")) != 101:
            raise ConnectionError("the service did not open a WebSocket")
    times: list[float] = []
    statuses: dict[int, int] = {}
    end = 0.0

    async def client(number: int, connection: Connection) -> None:
        rng = random.Random(number)
        while len(times) < max_requests:
            user, body = rng.randrange(users), bodies[rng.randrange(len(bodies))]
            start = time.perf_counter()
            if start > end:
                return
            message = frame(body) if websocket else request("POST", f"/v1/users/user{user}/observe", body, kind)
            status = await connection.send(message)
            times.append(time.perf_counter() - start)
            statuses[status] = statuses.get(status, 0) + 1

    end = time.perf_counter() + min(2.0, seconds / 4)
    await asyncio.gather(*(client(-i, c) for i, c in enumerate(pool)))  # warm up
    times.clear()
    statuses.clear()
    service_cpu, client_cpu = processor_seconds(port), time.process_time()
    start = time.perf_counter()
    end = start + seconds
    await asyncio.gather(*(client(i, c) for i, c in enumerate(pool)))
    elapsed = time.perf_counter() - start
    client_cpu, service_cpu = time.process_time() - client_cpu, processor_seconds(port) - service_cpu
    for connection in pool:
        connection.transport.close()
    percentiles = statistics.quantiles(times, n=100)
    return {
        "form": form,
        "users": users,
        "connections": connections,
        "requests": len(times),
        "requests_per_second": round(len(times) / elapsed, 1),
        "ms_p50": round(1e3 * percentiles[49], 2),
        "ms_p99": round(1e3 * percentiles[98], 2),
        "service_cpu_us_per_request": round(1e6 * service_cpu / len(times), 1),
        "client_cpu_us_per_request": round(1e6 * client_cpu / len(times), 1),
        "statuses": {str(k): v for k, v in sorted(statuses.items())},
    }


def free_socket() -> socket.socket:
    """A socket that listens on a free loopback port."""
    return socket.create_server(("127.0.0.1", 0), backlog=2048)


def processor_seconds(port: int) -> float:
    """CPU time of the service, from its metrics."""
    with urlopen(f"http://localhost:{port}/metrics") as page:
        text = page.read().decode()
    return float(text.split("\nprocess_cpu_seconds_total ")[1].split("\n", 1)[0])


def wait_until_ready(port: int, seconds: float = 60.0) -> None:
    """Wait until the service responds.

    Raises:
        TimeoutError: the service did not start in time.
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


def measure(
    users: int, connections: int, seconds: float, forms: list[str], max_requests: int = 200_000
) -> dict[str, Any]:
    """Measure each form of request, and the load average of the machine.

    Args:
        users: number of enrolled users.
        connections: number of concurrent connections.
        seconds: duration of the measurement of each form.
        forms: ``binary``, ``json``, ``socket``.
        max_requests: maximum number of requests of each form.
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
            wait_until_ready(port)
            load_before = os.getloadavg()[0]
            rows = [run(load(port, users, connections, seconds, form, max_requests)) for form in forms]
        finally:
            service.terminate()
            service.join(10)
            service.kill()
    return {"cores": os.cpu_count(), "load_before": load_before, "load_after": os.getloadavg()[0], "rows": rows}


def main() -> int:
    """Measure, print JSON and optionally update a document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--connections", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of the measurement of each form")
    parser.add_argument("--forms", default="binary,json,socket", help="comma-separated, of binary, json and socket")
    parser.add_argument("--into", type=Path, help="also update the table of this document")
    args = parser.parse_args()
    result = measure(args.users, args.connections, args.seconds, args.forms.split(","))
    print(json.dumps(result, indent=1))
    if args.into:
        replace_block(args.into, "load", as_markdown(result))
    return 0


def as_markdown(result: dict[str, Any]) -> str:
    """The result of `measure` as a Markdown table with a caption."""
    left_out = {"users", "client_cpu_us_per_request", "statuses"}
    rows = [{k.replace("_", " "): str(v) for k, v in row.items() if k not in left_out} for row in result["rows"]]
    load_average = f"load average {result['load_before']:.1f} before and {result['load_after']:.1f} after"
    setup = f"{result['rows'][0]['users']} users, {result['cores']} cores shared with the load generator"
    return f"{markdown_table(rows)}\n{setup}; {load_average}.\n"


if __name__ == "__main__":
    raise SystemExit(main())
