"""Flower's own Ray simulation, driven through ``flwr run`` as a user would, and nothing left behind.

A session owns all it starts: a SuperLink on a free loopback port, and below one temporary directory Flower's
home and Ray's files. ``flwr run`` says neither whether a run succeeded nor what came of it, so the status is
read from ``flwr list`` and the outcome from the file that the ServerApp writes. The app handed to Flower has
no code but the caller's module search path and two references: in a checkout and from a wheel, what runs is
what the caller imports.

What the clients keep stays with them: Ray gives no access to it, and `Outcome.kept` is empty.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w
import torch

from fedbn.errors import UserError
from fedbn.federation import Outcome
from fedbn.run import Run
from fedbn.setting import setting
from simulations.store import load_outcome

HOST = "127.0.0.1"
LINK = "fedbn"
"""Name of the private SuperLink in the private Flower home."""

START_SECONDS = 60.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.2
TAIL_LINES = 25

APP: dict[str, Any] = {
    "project": {"name": "fedbn-ray", "version": "0", "license": "Apache-2.0"},
    "tool": {
        "flwr": {
            "app": {
                "publisher": "fedbn",
                "fab-include": ["fedbn_ray_server.py", "fedbn_ray_client.py"],
                "components": {"serverapp": "fedbn_ray_server:app", "clientapp": "fedbn_ray_client:app"},
                "config": {"run": "", "out": ""},
            }
        }
    },
}

MODULES = {"fedbn_ray_server.py": "simulations.app", "fedbn_ray_client.py": "clients.app"}

# Flower puts its copy of the app first, and wants to see `app` assigned before it runs anything.
MODULE = """import sys

caller = {paths!r}
sys.path[:] = [*caller, *(path for path in sys.path if path not in caller)]

import {module}

app = {module}.app
"""

PRIVATE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "NO_PROXY": HOST,
    "no_proxy": HOST,
}


Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


class RayRunError(RuntimeError):
    """Flower's simulation failed; the message ends with its log."""


def run_on_ray(run: Run, *, actors: int | None = None) -> Outcome:
    """Execute one run in a session of its own.

    Args:
        run: what to do.
        actors: Ray workers that serve the clients; None for one a processor.

    Raises:
        UserError: Ray is not installed, or the run cannot work.
        RayRunError: the simulation failed.
    """
    with ray_session(actors) as execute:
        return execute(run)


@contextmanager
def ray_session(actors: int | None = None) -> Iterator[Callable[[Run], Outcome]]:
    """A function that executes runs, one after the other, on one SuperLink that lives for this block.

    Raises:
        UserError: Ray is not installed.
        RayRunError: the SuperLink does not start.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("engine ray needs Ray: pip install 'fedbn[ray]', or use --engine grid (same numbers)")
    place = Path(tempfile.mkdtemp(prefix="fb-", dir=_short_temporary_directory()))
    link = _Link(place, actors or _processors())
    try:
        with _handling(_leave, signal.SIGTERM):
            link.start()
            yield link.execute
    finally:
        # A second Ctrl-C, out of impatience, would leave half of it running.
        with _handling(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):
            link.stop()
            shutil.rmtree(place, ignore_errors=True)


@dataclass
class _Link:
    """A SuperLink with everything that descends from it.

    Attributes:
        place: its directory: Flower's home, the app, logs, outcomes, everybody's temporary files.
        actors: Ray workers a run.
        sessions: operating system sessions of its processes; unlike parents they survive a parent's death.
    """

    place: Path
    actors: int
    port: int = 0
    sessions: set[int] = field(default_factory=set)
    process: subprocess.Popen[bytes] | None = None
    runs: int = 0

    def start(self) -> None:
        """Start the SuperLink and wait until it answers."""
        self.port = _free_port()
        _write_app(self.place / "app")
        (self.place / "home").mkdir()
        (self.place / "tmp").mkdir()
        (self.place / "home" / "config.toml").write_text(tomli_w.dumps(_connection(self.port)))
        command = [_script("flower-superlink"), "--simulation", "--insecure"]
        command += ["--disable-runtime-dependency-installation", "--host", HOST, "--port", str(self.port)]
        with self._log("superlink").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
        self.sessions.add(self.process.pid)
        deadline = time.monotonic() + START_SECONDS
        while not _answers(self.port):
            self._check_alive()
            if time.monotonic() > deadline:
                raise RayRunError(f"Flower's SuperLink does not answer\n{self._tail('superlink')}")
            time.sleep(POLL_SECONDS)
        self._check_alive()

    def execute(self, run: Run) -> Outcome:
        """Submit a run, wait for its end, read its outcome.

        Raises:
            UserError: as the ServerApp raised it.
            RayRunError: any other failure.
        """
        users = len(setting(run).population.users)
        self.runs += 1
        name, out = f"run-{self.runs}", self.place / f"outcome-{self.runs}.safetensors"
        config = self.place / f"{name}.toml"
        config.write_text(tomli_w.dumps({"run": run.to_json(), "out": str(out)}))
        federation = _federation(users, min(self.actors, users), run.device)
        settings = ["--run-config", str(config), "--federation-config", federation]
        run_id = str(self._flwr("run", str(self.place / "app"), LINK, *settings)["run-id"])
        self._follow(run_id, name)
        status = self._flwr("list", LINK, "--run-id", run_id)["runs"][0]
        if status["status"] != "finished:completed":
            raise self._failure(name, status["status"], status["status-details"])
        outcome = load_outcome(out, run)
        out.unlink()
        return outcome

    def stop(self) -> None:
        """End every process of this SuperLink, politely first."""
        self._find()
        if self.process is not None and self.process.poll() is None:
            # It ends its executor itself, which would otherwise complain.
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        for number, patience in ((signal.SIGTERM, STOP_SECONDS / 2), (signal.SIGKILL, STOP_SECONDS)):
            deadline = time.monotonic() + patience
            for pid in self._find():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            while self._find() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        if self.process is not None:
            self.process.wait()

    def _follow(self, run_id: str, name: str) -> None:
        """Write the run's log to a file until the run ends."""
        command = [_script("flwr"), "log", run_id, LINK, "--stream"]
        with self._log(name).open("wb") as log:
            following = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
            )
            try:
                while following.poll() is None:
                    self._check_alive()
                    self._find()
                    time.sleep(POLL_SECONDS)
            finally:
                following.kill()
                following.wait()

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        """What a command of Flower's says as JSON."""
        done = subprocess.run(
            [_script("flwr"), *arguments, "--format", "json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self._environment(),
            check=False,
        )
        with suppress(json.JSONDecodeError):
            answer = json.loads(done.stdout)
            if answer.get("success"):
                return dict(answer)
        said = f"{done.stdout}\n{done.stderr}".strip()
        raise RayRunError(f"flwr {arguments[0]} failed: {said}\n{self._tail('superlink')}")

    def _failure(self, name: str, status: str, details: str) -> Exception:
        cause = _plain(details).removeprefix("Simulation failed with exception: ").strip()
        first, *_ = cause.splitlines() or [""]
        if f"{UserError.__module__}.{UserError.__qualname__}: {first}" in self._said(name):
            return UserError(cause)
        return RayRunError(f"Flower's simulation: {status}: {cause}\n{self._tail(name)}")

    def _check_alive(self) -> None:
        if self.process is None or self.process.poll() is not None:
            raise RayRunError(f"Flower's SuperLink is gone\n{self._tail('superlink')}")

    def _find(self) -> list[int]:
        """All live processes of the SuperLink; remembers the sessions that its children open."""
        table = _processes()
        while True:
            mine = {pid for pid, _, session in table if session in self.sessions}
            opened = {session for _, parent, session in table if parent in mine} - self.sessions
            if not opened:
                return sorted(mine)
            self.sessions |= opened

    def _environment(self) -> dict[str, str]:
        # A Ray cluster that the caller talks to is none of ours; all else (caches, say) reaches the workers.
        kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")}
        own = {
            "FLWR_HOME": str(self.place / "home"),
            "TMPDIR": str(self.place / "tmp"),
            "RAY_TMPDIR": str(self.place / "tmp"),
            "PATH": os.pathsep.join([_scripts(), os.environ.get("PATH", os.defpath)]),
        }
        return kept | PRIVATE | own

    def _log(self, name: str) -> Path:
        return self.place / f"{name}.log"

    def _said(self, name: str) -> str:
        return _plain(self._log(name).read_text(errors="replace"))

    def _tail(self, name: str) -> str:
        return "\n".join(self._said(name).splitlines()[-TAIL_LINES:])


def _connection(port: int) -> dict[str, Any]:
    """Flower's configuration file: one SuperLink, ours."""
    return {"superlink": {"default": LINK, LINK: {"address": f"{HOST}:{port}", "insecure": True}}}


def _write_app(place: Path) -> None:
    place.mkdir()
    (place / "pyproject.toml").write_text(tomli_w.dumps(APP))
    # A console script's path lacks the working directory, where the models are that a user names.
    paths = [path or os.getcwd() for path in [*sys.path, ""]]
    for name, module in MODULES.items():
        (place / name).write_text(MODULE.format(paths=paths, module=module))


def _federation(users: int, actors: int, device: str) -> str:
    """Flower's federation config: one SuperNode a user, and one processor an actor.

    >>> _federation(10, 2, "cpu").split()[:3]
    ['num-supernodes=10', 'client-resources-num-cpus=1', 'init-args-num-cpus=2']
    """
    settings = [
        f"num-supernodes={users}",
        "client-resources-num-cpus=1",
        f"init-args-num-cpus={actors}",
        'init-args-logging-level="ERROR"',
        "init-args-log-to-driver=false",
    ]
    if device.startswith("cuda"):
        # Ray hides the devices from actors that ask for none, and rounds shares to four places.
        devices = torch.cuda.device_count()
        share = min(1.0, math.floor(10_000 * devices / actors) / 10_000)
        settings += [f"init-args-num-gpus={devices}", f"client-resources-num-gpus={share}"]
    return " ".join(settings)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _short_temporary_directory() -> str | None:
    # Ray makes sockets in here; their paths may have little more than a hundred characters.
    return None if len(tempfile.gettempdir()) <= 24 or not os.access("/tmp", os.W_OK) else "/tmp"


def _plain(text: str) -> str:
    """Text without the terminal's colours, literal or escaped."""
    return re.sub(r"(\x1b|\\x1b)\[[0-9;]*m", "", text)


def _scripts() -> str:
    """Where this environment keeps its commands, whether it is activated or not."""
    return os.pathsep.join([sysconfig.get_path("scripts"), str(Path(sys.executable).parent)])


def _script(name: str) -> str:
    return shutil.which(name, path=_scripts()) or name


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://{HOST}:{port}/health", timeout=2):
            return True
    except OSError:
        return False


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
    """Unwind the stack on a polite kill too, so that everything is stopped."""
    raise SystemExit(128 + number)


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
