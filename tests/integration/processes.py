"""Processes that tests start; all inherit a mark in their environment, by which they are found."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedbn_simulations.flower.superlink import FlowerRunError
from tests.helpers import wait_until

MARK = "FEDBN_TEST_MARK"


def marked(mark, command=""):
    """Live processes with the mark and this text in their command: id -> environment. Zombies have no environment."""
    processes = {}
    for directory in Path("/proc").iterdir():
        try:
            environment = (directory / "environ").read_bytes().decode(errors="replace").split("\0")
            if f"{MARK}={mark}" in environment and command in (directory / "cmdline").read_text():
                processes[int(directory.name)] = dict(e.split("=", 1) for e in environment if "=" in e)
        except OSError:
            continue
    return processes


def kill(pids):
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def kill_marked(mark):
    """Kill all processes that a test has started and not stopped."""
    while pids := marked(mark):
        kill(pids)
        time.sleep(0.2)


def kill_server_of(execute, mark, command, checkpoint):
    """Execute a run in a thread and kill its server, the process of ``command``, once it has written a checkpoint."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(execute)
        wait_until(lambda: checkpoint.exists() or future.done(), 400)
        wait_until(lambda: marked(mark, command) or future.done(), 400)
        kill(marked(mark, command))
        with pytest.raises(FlowerRunError):
            future.result(400)
