"""Processes that a command starts and that must not outlive it, whatever ends the command."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

HOST = "127.0.0.1"
STOP_SECONDS = 10.0
POLL_SECONDS = 0.2
LEAVING = (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers
Process = subprocess.Popen[bytes]


@dataclass
class Family:
    """Processes started here, with everything that descends from them.

    Attributes:
        sessions: operating system sessions of its processes; unlike parents they survive a parent's death.
        started: those that were started here, by name, in that order.
    """

    sessions: set[int] = field(default_factory=set)
    started: dict[str, Process] = field(default_factory=dict)

    def start(self, name: str, command: list[str], log: Path, environment: Mapping[str, str]) -> Process:
        """Start a process in a session of its own, with all it says going to a file."""
        late: list[int] = []
        # A Ctrl-C between the start of a process and its entry here would leave it behind.
        with _handling(lambda number, frame: late.append(number), signal.SIGINT, signal.SIGTERM):
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            self.sessions.add(process.pid)
            self.started[name] = process
        for number in late:
            signal.raise_signal(number)
        return process

    def stop(self) -> None:
        """End all of them: politely those started here, the last one first, then whoever is left."""
        self.find()
        for process in reversed(self.started.values()):
            end(process)
        for number, patience in ((signal.SIGTERM, STOP_SECONDS / 2), (signal.SIGKILL, STOP_SECONDS)):
            deadline = time.monotonic() + patience
            for pid in self.find():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            while self.find() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        for process in self.started.values():
            process.wait()

    def find(self) -> list[int]:
        """Those that live; remembers the sessions that children open."""
        table = _processes()
        while True:
            mine = {pid for pid, _, session in table if session in self.sessions}
            opened = {session for _, parent, session in table if parent in mine} - self.sessions
            if not opened:
                return sorted(mine)
            self.sessions |= opened


def end(process: Process) -> None:
    """Ask a process to end, and wait a while for it: it may have children to end itself."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)


@contextmanager
def private_place(stop: Callable[[], None]) -> Iterator[Path]:
    """A temporary directory for a family, which ``stop`` ends with this block, also on Ctrl-C or a polite kill."""
    place = Path(tempfile.mkdtemp(prefix="fb-", dir=_short_temporary_directory()))
    # Whoever ignores Ctrl-C, as jobs in a shell's background do, goes on ignoring it.
    numbers = [number for number in LEAVING if signal.getsignal(number) is not signal.SIG_IGN]
    with _handling(_leave, *numbers):
        try:
            try:
                yield place
            finally:
                _ignore()
        finally:  # reached whatever happens before signals are ignored
            stop()
            shutil.rmtree(place, ignore_errors=True)


def scripts() -> str:
    """Where this environment keeps its commands, whether it is activated or not."""
    return os.pathsep.join([sysconfig.get_path("scripts"), str(Path(sys.executable).parent)])


def script(name: str) -> str:
    """Path of one of this environment's commands."""
    return shutil.which(name, path=scripts()) or name


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _short_temporary_directory() -> str | None:
    # Ray makes sockets in here; their paths may have little more than a hundred characters.
    return None if len(tempfile.gettempdir()) <= 24 or not os.access("/tmp", os.W_OK) else "/tmp"


def _processes() -> list[tuple[int, int, int]]:
    """Process, parent and session of all that live, zombies left out."""
    found = []
    for line in _process_lines():
        pid, parent, state = line.split(maxsplit=2)
        if not state.startswith("Z"):
            with suppress(ProcessLookupError, PermissionError):
                found.append((int(pid), int(parent), os.getsid(int(pid))))
    return found


def _process_lines() -> Iterator[str]:
    if not Path("/proc/self/stat").exists():
        command = ["ps", "-A", "-o", "pid=,ppid=,state="]
        yield from subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with suppress(OSError):
                state, parent = (place / "stat").read_text().rpartition(")")[2].split()[:2]
                yield f"{place.name} {parent} {state}"


def _leave(number: int, frame: FrameType | None) -> None:
    """Unwind the stack, on a polite kill too, so that everything is stopped; a second one would leave half of it."""
    _ignore()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _ignore() -> None:
    """Be deaf to whoever wants this process to leave: it is leaving."""
    if threading.current_thread() is threading.main_thread():
        for number in LEAVING:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handling(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Handle signals in a way of ours, where Python allows it: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, theirs in before.items():
            signal.signal(number, theirs)
