"""``python -m benchmarks.faults``: kill the service under writes and long commands at work, and count what is lost.

The service runs in a separate process on one store, which all tries share. Several connections send changes without
pause: windows, resets, new users and deletions. After a random time the process gets SIGKILL, the service starts again,
and every user is compared with the last change that was acknowledged. The change in flight may or may not be stored.

A long command gets SIGKILL at a random time and runs again with the same arguments until it finishes. Its results must
have the same bits as those of a run without kills.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.service import CLASSES, SHAPE, free_socket, wait_until_ready
from fedbn_simulations.claims.store import Store
from fedbn_simulations.results.formatting import markdown_table

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
    from fedbn_simulations.service.access import Access
    from fedbn_simulations.service.api import create_app
    from fedbn_simulations.service.server import run
    from fedbn_simulations.service.users import Limits, UserStore

    model = build("har-cnn", SHAPE, CLASSES, seed=0).eval()
    names = [f"class {i}" for i in range(CLASSES)]
    # Fewer users in memory than there are, so that users are also reloaded from the store.
    limits = Limits(capacity=CONNECTIONS * USERS_PER_CONNECTION // 2)
    users = UserStore(model, SHAPE, names, "pseudo:n0=64", store=SQLiteStore(file), limits=limits)
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
    context.set_forkserver_preload(
        ["fedbn_simulations.service.api", "fedbn_simulations.service.server", "fedbn.models"]
    )
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


def compared_runs(folder: Path) -> dict[str, Any]:
    """Results of ``fedbn compare``: per run, the learning curve, the evaluations and the notices."""
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("runs/*/result.json")}
    return {run: [result[k] for k in ("curve", "evaluations", "notices")] for run, result in results.items()}


def adapted_users(folder: Path) -> dict[str, Any]:
    """Results of ``fedbn adapt``: the metrics of each user with each rule."""
    return json.loads(pd.read_parquet(folder / "users.parquet").to_json())


def measured_claims(folder: Path) -> dict[str, Any]:
    """Results of ``fedbn claims``: the measured values of each cell."""
    return {str(cell): line["measured"] for cell, line in Store(folder / "claims" / "cells.jsonl").results.items()}


COMMANDS: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "compare": (
        "digits8:users=4:unseen=1 --strategies fedavg,fedbn,groupnorm --rounds 20 --seeds 2 --eval-every 5",
        compared_runs,
    ),
    "adapt": ("hapt:reserved=20:unseen=2 --rounds 2 --seeds 2 --rules dabn,ema", adapted_users),
    "claims": ("binary --quick --seeds 2", measured_claims),
}
"""Arguments of each long command, and a function that reads the results."""


def command_kills(
    name: str, arguments: str, results: Callable[[Path], dict[str, Any]], tries: int, folder: Path, log: Log
) -> dict[str, Any]:
    """Kill a command at random times, and run it again with the same arguments until it finishes.

    Args:
        name: name of the command.
        arguments: its arguments without ``--out``.
        results: reads the results from a directory.
        tries: number of kills.
        folder: directory for the results.
        log: called with a message after each kill.

    Returns:
        Row of the table of faults: ``kind``, ``tries``, and ``lost or wrong``: the number of finished commands with
        other results than without kills, and of commands that failed.
    """
    draw, killed, wrong, directory = random.Random(f"{name} kills"), 0, 0, 0
    command = [sys.executable, "-m", "fedbn", name, *arguments.split(), "--quiet", "--out"]

    def start(out: Path) -> subprocess.Popen[bytes]:
        # A new session, so that the kill reaches the workers of the command at the same time.
        return subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, start_new_session=True)

    begin = time.perf_counter()
    if start(folder / "whole").wait():
        raise RuntimeError(f"fedbn {name} fails without a kill")
    seconds, expected = time.perf_counter() - begin, results(folder / "whole")
    while killed < tries:
        process = start(folder / f"killed{directory}")
        try:
            code = process.wait(draw.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            log(f"{name}: kill {killed} of {tries}, {wrong} lost or wrong")
            continue
        wrong += code != 0 or results(folder / f"killed{directory}") != expected
        directory += 1
    process = start(folder / f"killed{directory}")
    wrong += process.wait() != 0 or results(folder / f"killed{directory}") != expected
    return {"kind": f"kill -9 of fedbn {name}", "tries": tries, "lost or wrong": wrong}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of faults. Returns 1 if anything was lost or wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="kills of the service")
    parser.add_argument("--command-kills", type=int, default=25, help="kills of each long command")
    args = parser.parse_args(argv)

    def log(text: str) -> None:
        print(text, flush=True)

    rows = []
    with tempfile.TemporaryDirectory() as name:
        if args.kills:
            rows.append(service_kills(args.kills, Path(name), log=log))
        for command, (arguments, results) in COMMANDS.items() if args.command_kills else ():
            rows.append(command_kills(command, arguments, results, args.command_kills, Path(name) / command, log))
    columns = ("kind", "tries", "lost or wrong", "acknowledged")
    print(markdown_table([{column: str(row.get(column, "")) for column in columns} for row in rows]))
    return int(any(row["lost or wrong"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
