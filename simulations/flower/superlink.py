"""A private SuperLink of Flower's, driven through ``flwr`` as a user would.

It owns a free loopback port and one directory with Flower's home, the app, logs and outcomes. ``flwr run`` says
neither whether a run succeeded nor what came of it, so the status is read from ``flwr list`` and the outcome from
the file that the ServerApp writes. The app handed to Flower has no code but the caller's module search path and two
references: in a checkout and from a wheel, what runs is what the caller imports.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedbn.errors import UserError
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome
from simulations.flower.certificates import Certificates
from simulations.flower.processes import HOST, POLL_SECONDS, Family, free_port, script, scripts
from simulations.storage.checkpoint import load_outcome

LINK = "fedbn"
"""Name of the private SuperLink in the private Flower home."""

START_SECONDS = 60.0
TAIL_LINES = 25

APP: dict[str, Any] = {
    "project": {"name": "fedbn-run", "version": "0", "license": "Apache-2.0"},
    "tool": {
        "flwr": {
            "app": {
                "publisher": "fedbn",
                "fab-include": ["fedbn_run_server.py", "fedbn_run_client.py"],
                "components": {"serverapp": "fedbn_run_server:app", "clientapp": "fedbn_run_client:app"},
                "config": {"run": "", "out": ""},
            }
        }
    },
}

MODULES = {"fedbn_run_server.py": "simulations.app", "fedbn_run_client.py": "clients.app"}

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


class FlowerRunError(RuntimeError):
    """A run in an engine of Flower's failed; the message ends with its log."""


@dataclass
class SuperLink:
    """A SuperLink with everything that descends from it.

    Attributes:
        place: its directory: Flower's home, the app, logs, outcomes, everybody's temporary files.
        options: of ``flower-superlink``, besides address and encryption.
        certificates: what it shows its callers; None: it speaks in the clear.
        family: its processes.
        extra: environment variables of its processes, besides those that are always set.
        port: of all its APIs.
        runs: how many were executed.
    """

    place: Path
    options: tuple[str, ...] = ()
    certificates: Certificates | None = None
    family: Family = field(default_factory=Family)
    extra: dict[str, str] = field(default_factory=dict)
    port: int = 0
    runs: int = 0

    def start(self) -> None:
        """Start the SuperLink and wait until it answers.

        Raises:
            FlowerRunError: it ends, or does not answer in time.
        """
        self.port = free_port()
        _write_app(self.place / "app")
        (self.place / "home").mkdir()
        (self.place / "tmp").mkdir()
        (self.place / "home" / "config.toml").write_text(tomli_w.dumps(self._connection()))
        shown = self.certificates.options() if self.certificates else ["--insecure"]
        command = [script("flower-superlink"), *self.options, *shown]
        command += ["--disable-runtime-dependency-installation", "--host", HOST, "--port", str(self.port)]
        self.begin("superlink", command)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            self.check()
            if time.monotonic() > deadline:
                raise FlowerRunError(f"Flower's SuperLink does not answer\n{self.tail('superlink')}")
            time.sleep(POLL_SECONDS)
        self.check()

    def begin(self, name: str, command: list[str]) -> None:
        """Start one more process of the family, with a log of its name."""
        self.family.start(name, command, self.log(name), self.environment())

    def execute(self, run: Run, *settings: str, out: Path | None = None) -> Outcome:
        """Submit a run, wait for its end, read its outcome.

        Args:
            run: what to do.
            settings: options of ``flwr run``.
            out: where the server writes how far it has got, and goes on from; None: a file that goes with the run.

        Raises:
            UserError: as the ServerApp raised it.
            FlowerRunError: any other failure.
        """
        self.runs += 1
        name, passing = f"run-{self.runs}", self.place / f"outcome-{self.runs}.safetensors"
        config = self.place / f"{name}.toml"
        file = passing if out is None else out.resolve()
        config.write_text(tomli_w.dumps({"run": run.to_json(), "out": str(file)}))
        submitted = self.flwr("run", str(self.place / "app"), LINK, "--run-config", str(config), *settings)
        run_id = str(submitted["run-id"])
        self._follow(run_id, name)
        status = self.flwr("list", LINK, "--run-id", run_id)["runs"][0]
        if status["status"] != "finished:completed":
            raise self._failure(name, status["status"], status["status-details"])
        outcome = load_outcome(file, run)
        passing.unlink(missing_ok=True)
        return outcome

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """What a command of Flower's says as JSON.

        Raises:
            FlowerRunError: the command failed.
        """
        done = subprocess.run(
            [script("flwr"), *arguments, "--format", "json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment(),
            check=False,
        )
        with suppress(json.JSONDecodeError):
            answer = json.loads(done.stdout)
            if answer.get("success"):
                return dict(answer)
        said = f"{done.stdout}\n{done.stderr}".strip()
        raise FlowerRunError(f"flwr {arguments[0]} failed: {said}\n{self.tail('superlink')}")

    def check(self) -> None:
        """Raise unless all that was started lives.

        Raises:
            FlowerRunError: a process is gone.
        """
        for name, process in self.family.started.items():
            if process.poll() is not None:
                raise FlowerRunError(f"Flower's {name} is gone\n{self.tail(name)}")

    def environment(self) -> dict[str, str]:
        """Environment variables of its processes and of the commands that talk to it."""
        # A Ray cluster that the caller talks to is none of ours; all else (caches, say) reaches the workers.
        kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")}
        own = {
            "FLWR_HOME": str(self.place / "home"),
            "TMPDIR": str(self.place / "tmp"),
            "RAY_TMPDIR": str(self.place / "tmp"),
            "PATH": os.pathsep.join([scripts(), os.environ.get("PATH", os.defpath)]),
        }
        return kept | PRIVATE | own | self.extra

    def log(self, name: str) -> Path:
        """File of what a process or a run says."""
        return self.place / f"{name}.log"

    def tail(self, name: str) -> str:
        """The last that a process or a run said."""
        return "\n".join(self._said(name).splitlines()[-TAIL_LINES:])

    def _follow(self, run_id: str, name: str) -> None:
        """Write the run's log to a file until the run ends."""
        command = [script("flwr"), "log", run_id, LINK, "--stream"]
        with self.log(name).open("wb") as log:
            following = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
            )
            try:
                while following.poll() is None:
                    self.check()
                    self.family.find()
                    time.sleep(POLL_SECONDS)
            finally:
                following.kill()
                following.wait()

    def _failure(self, name: str, status: str, details: str) -> Exception:
        cause = _plain(details).removeprefix("Simulation failed with exception: ").strip()
        first, *_ = cause.splitlines() or [""]
        if f"{UserError.__module__}.{UserError.__qualname__}: {first}" in self._said(name):
            return UserError(cause)
        return FlowerRunError(f"Flower's run: {status}: {cause}\n{self.tail(name)}")

    def _said(self, name: str) -> str:
        return _plain(self.log(name).read_text(errors="replace"))

    def _connection(self) -> dict[str, Any]:
        """Flower's configuration file: one SuperLink, ours."""
        trusted = {"root-certificates": str(self.certificates.root)} if self.certificates else {"insecure": True}
        return {"superlink": {"default": LINK, LINK: {"address": f"{HOST}:{self.port}"} | trusted}}

    def _answers(self) -> bool:
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        scheme = "http"
        if self.certificates:
            scheme = "https"
            trusted = ssl.create_default_context(cafile=str(self.certificates.root))
            handlers.append(urllib.request.HTTPSHandler(context=trusted))
        direct = urllib.request.build_opener(*handlers)
        try:
            with direct.open(f"{scheme}://{HOST}:{self.port}/health", timeout=2):
                return True
        except OSError:
            return False


def _write_app(place: Path) -> None:
    place.mkdir()
    (place / "pyproject.toml").write_text(tomli_w.dumps(APP))
    # A console script's path lacks the working directory, where the models are that a user names.
    paths = [path or os.getcwd() for path in [*sys.path, ""]]
    for name, module in MODULES.items():
        (place / name).write_text(MODULE.format(paths=paths, module=module))


def _plain(text: str) -> str:
    """Text without the terminal's colors, literal or escaped."""
    return re.sub(r"(\x1b|\\x1b)\[[0-9;]*m", "", text)
