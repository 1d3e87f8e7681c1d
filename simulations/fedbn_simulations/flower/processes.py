"""Child processes that never outlive the command that started them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
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
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:  # not on Windows
    from multiprocessing.context import ForkServerContext, SpawnContext
    from multiprocessing.process import BaseProcess

HOST = "127.0.0.1"
STOP_SECONDS = 10.0
POLL_SECONDS = 0.2
TERMINATION_SIGNALS = (signal.SIGINT, signal.SIGTERM)

GROUP_VARIABLE = "FEDBN_PROCESS_GROUP"
"""Environment variable with the id of the group, which all descendants inherit."""

ENDED = b"ended"
"""Message to the guardian that the processes are stopped by their owner."""

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers
Process = subprocess.Popen[bytes]


@dataclass
class ProcessGroup:
    """Processes started here, with all their descendants.

    Descendants are found by their session or by their environment. Sessions alone miss a process that opens its own
    session just before its parent dies; environments alone miss a process that clears its environment.

    Attributes:
        sessions: operating system sessions of the processes; unlike parent ids, they survive the death of a parent.
        started: the processes started here, by name, in order.
        id: value of ``GROUP_VARIABLE`` in the environment of the processes.
        by_session: whether sessions are followed. False if processes may share the session of the user's terminal.
    """

    sessions: set[int] = field(default_factory=set)
    started: dict[str, Process] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    by_session: bool = True

    def start(self, name: str, command: list[str], log: Path, environment: Mapping[str, str]) -> Process:
        """Start a process in a new session, with its output redirected to a file."""
        pending: list[int] = []
        # Signals are deferred: an interrupt between the start of the process and its registration would orphan it.
        with _signal_handler(lambda number, frame: pending.append(number), *TERMINATION_SIGNALS):
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**environment, GROUP_VARIABLE: self.id},
                    start_new_session=True,
                )
            self.sessions.add(process.pid)
            self.started[name] = process
        for number in pending:
            signal.raise_signal(number)
        return process

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A temporary directory for the processes; at the end, they are stopped and it is deleted.

        This also happens on SIGINT and SIGTERM, and by a guardian process if this process is killed.
        """
        with temporary_workspace(self.stop) as directory, self.guarded(directory):
            yield directory

    @contextmanager
    def guarded(self, *directories: Path) -> Iterator[None]:
        """Have a guardian process stop the processes and delete the directories if this process is killed."""
        command = [sys.executable, "-m", __name__, self.id, str(int(self.by_session)), *map(str, directories)]
        # Only this process has the other end of the pipe, so that it is closed when this process ends.
        guardian = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            yield
        finally:
            guardian.communicate(ENDED)

    def stop(self) -> None:
        """Terminate all processes: first those started here, last one first, then the remaining descendants."""
        self.live_pids()
        for process in reversed(self.started.values()):
            terminate(process)
        for number, timeout in ((signal.SIGTERM, STOP_SECONDS / 2), (signal.SIGKILL, STOP_SECONDS)):
            deadline = time.monotonic() + timeout
            for pid in self.live_pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            while self.live_pids() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        for process in self.started.values():
            process.wait()

    def live_pids(self) -> list[int]:
        """Ids of the live processes; also records the sessions that descendants have opened."""
        table = _process_table()
        while True:
            pids = {pid for pid, _, session, group in table if session in self.sessions or group == self.id}
            if not self.by_session:
                return sorted(pids)
            opened = {session for pid, parent, session, _ in table if parent in pids or pid in pids} - self.sessions
            opened.discard(os.getsid(0))  # the session of this process also has processes of others
            if not opened:
                return sorted(pids)
            self.sessions |= opened


def guard(group: ProcessGroup, directories: Sequence[str], owner: IO[bytes]) -> None:
    """Wait until the owner of a process group ends. If it was killed, stop the group and delete its directories.

    Args:
        group: the group.
        directories: temporary directories of the group.
        owner: pipe from the owner.
    """
    if owner.read() != ENDED:
        group.stop()
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)


PRELOADED = ("fedbn_simulations.engines.workers", "torch._dynamo")
"""Modules of every worker process. The first optimizer of a process imports the second one, which takes seconds."""


def worker_context() -> SpawnContext | ForkServerContext:
    """Context of `multiprocessing` for worker processes, which start in milliseconds where the system can fork.

    They are forks of a process that has only imported modules, so they inherit neither threads nor devices.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def preload_workers() -> None:
    """Begin to import the modules of worker processes, in parallel to the imports of this process."""
    if worker_context().get_start_method() == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()


def prepare_worker() -> None:
    """Let this worker of `multiprocessing` run code of users, which may start processes such as those of a DataLoader.

    The worker starts them as any other process does, and ends with them when its parent ends or calls `kill_worker`.
    It ignores interrupts, which its parent handles.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = multiprocessing.current_process()
    process.daemon = False  # daemons cannot start processes
    multiprocessing.set_start_method(None, force=True)  # a spawned process would spawn others, too, which takes seconds
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    end_with_parent()


def end_with_parent() -> None:
    """Let this worker of `multiprocessing` end as soon as its parent ends, even if the parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        if hasattr(os, "getpgrp") and os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def kill_worker(process: BaseProcess) -> None:
    """Kill a worker that has called `prepare_worker`, with the processes that it has started."""
    if hasattr(os, "killpg") and process.pid is not None:
        with suppress(ProcessLookupError, PermissionError):  # it has not begun, or has ended
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def terminate(process: Process) -> None:
    """Terminate a process and wait, because it may have to stop children."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)


@contextmanager
def temporary_workspace(stop: Callable[[], None]) -> Iterator[Path]:
    """A temporary directory; at the end of the context, also on SIGINT or SIGTERM, it calls ``stop`` and is deleted."""
    directory = Path(tempfile.mkdtemp(prefix="fb-", dir=_short_temporary_directory()))
    # Processes that ignore SIGINT, such as background jobs of a shell, continue to ignore it.
    numbers = [number for number in TERMINATION_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    with _signal_handler(_exit_on_signal, *numbers):
        try:
            try:
                yield directory
            finally:
                _ignore_termination_signals()
        finally:  # also reached if a signal arrives before signals are ignored
            stop()
            shutil.rmtree(directory, ignore_errors=True)


def scripts_path() -> str:
    """Search path of this environment's commands, which does not depend on activation."""
    return os.pathsep.join([sysconfig.get_path("scripts"), str(Path(sys.executable).parent)])


def script_path(name: str) -> str:
    """Path of one of this environment's commands."""
    return shutil.which(name, path=scripts_path()) or name


def free_port() -> int:
    """A loopback port that is currently unused."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _short_temporary_directory() -> str | None:
    # Ray creates sockets below this directory, and socket paths are limited to about a hundred characters.
    return None if len(tempfile.gettempdir()) <= 24 or not os.access("/tmp", os.W_OK) else "/tmp"


def _process_table() -> list[tuple[int, int, int, str]]:
    """Process id, parent id, session and group of all live processes, without zombies."""
    import psutil  # not needed by runs in this process

    table = []
    for process in psutil.process_iter(["ppid", "status", "environ"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE:
            with suppress(ProcessLookupError, PermissionError):
                group = (process.info["environ"] or {}).get(GROUP_VARIABLE, "")
                table.append((process.pid, process.info["ppid"], os.getsid(process.pid), group))
    return table


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Unwind the stack so that all processes are stopped, and ignore further signals meanwhile."""
    _ignore_termination_signals()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _ignore_termination_signals() -> None:
    """Ignore further termination signals during shutdown."""
    if threading.current_thread() is threading.main_thread():
        for number in TERMINATION_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def _signal_handler(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Install a signal handler for this context; has no effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


if __name__ == "__main__":
    guard(ProcessGroup(id=sys.argv[1], by_session=sys.argv[2] == "1"), sys.argv[3:], sys.stdin.buffer)
