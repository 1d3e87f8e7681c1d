"""A private Flower SuperLink, controlled through the ``flwr`` command line.

It uses a free loopback port and one directory with Flower's home, the app, logs and outcomes. ``flwr run`` reports
neither the success nor the result of a run, so the status is read from ``flwr list`` and the outcome from the file that
the ServerApp writes. The app submitted to Flower contains only the caller's module search path and two imports, so both
in a checkout and from a wheel it runs the code that the caller imports.
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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedbn.errors import UserError
from fedbn.federation.failures import ClientError
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome
from fedbn_simulations.flower.certificates import Certificates
from fedbn_simulations.flower.processes import (
    GROUP_VARIABLE,
    HOST,
    POLL_SECONDS,
    ProcessGroup,
    free_port,
    script_path,
    scripts_path,
)
from fedbn_simulations.server.nodes import REPLY_SECONDS, WAIT_SECONDS
from fedbn_simulations.server.safeguards import DEPLOYMENT_CONFIG, Scalar
from fedbn_simulations.server.validation import InvalidReply
from fedbn_simulations.storage.checkpoint import load_outcome

SUPERLINK_NAME = "fedbn"
"""Name of the SuperLink in the private Flower home."""

START_SECONDS = 60.0
COMMAND_SECONDS = 300.0
TAIL_LINES = 25

APP_CONFIG: dict[str, Any] = {
    "project": {"name": "fedbn-run", "version": "0", "license": "Apache-2.0"},
    "tool": {
        "flwr": {
            "app": {
                "publisher": "fedbn",
                "fab-include": ["fedbn_run_server.py", "fedbn_run_client.py"],
                "components": {"serverapp": "fedbn_run_server:app", "clientapp": "fedbn_run_client:app"},
                "config": {
                    **dict.fromkeys(("run", "out", "users", "sums"), ""),
                    **dict.fromkeys(("timeout", "wait"), 0.0),
                    **DEPLOYMENT_CONFIG,
                },
            }
        }
    },
}

MODULES = {"fedbn_run_server.py": "fedbn_simulations.app", "fedbn_run_client.py": "fedbn_clients.app"}

# Flower prepends its copy of the app to the path, and requires an assignment to `app` in the source.
MODULE_TEMPLATE = """import sys

caller = {paths!r}
sys.path[:] = [*caller, *(path for path in sys.path if path not in caller)]

import {module}

app = {module}.app
"""

ENVIRONMENT = {
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
    """A run in one of Flower's engines failed; the message ends with its log."""


@dataclass
class SuperLink:
    """A SuperLink with all its child processes.

    Attributes:
        directory: its directory, with Flower's home, the app, logs, outcomes and temporary files.
        options: options of ``flower-superlink``, except address and TLS.
        certificates: certificates for TLS; None: no TLS.
        processes: its processes.
        extra_environment: additional environment variables of its processes.
        timeout: seconds for which the server of a run waits for the replies in an exchange.
        wait: seconds for which the server of a run waits until every user has a node.
        port: port of all its APIs.
        num_runs: number of executed runs.
    """

    directory: Path
    options: tuple[str, ...] = ()
    certificates: Certificates | None = None
    processes: ProcessGroup = field(default_factory=ProcessGroup)
    extra_environment: dict[str, str] = field(default_factory=dict)
    timeout: float = REPLY_SECONDS
    wait: float = WAIT_SECONDS
    port: int = 0
    num_runs: int = 0

    def start(self) -> None:
        """Start the SuperLink and wait until it responds.

        Raises:
            FlowerRunError: it exits or does not respond in time.
        """
        self.port = free_port()
        _write_app(self.directory / "app")
        (self.directory / "home").mkdir()
        (self.directory / "tmp").mkdir()
        (self.directory / "home" / "config.toml").write_text(tomli_w.dumps(self._flower_config()))
        tls_options = self.certificates.options() if self.certificates else ["--insecure"]
        command = [script_path("flower-superlink"), *self.options, *tls_options]
        command += ["--disable-runtime-dependency-installation", "--host", HOST, "--port", str(self.port)]
        self.start_process("superlink", command)
        deadline = time.monotonic() + START_SECONDS
        while not self._is_healthy():
            self.check()
            if time.monotonic() > deadline:
                raise FlowerRunError(f"Flower's SuperLink does not respond\n{self.tail('superlink')}")
            time.sleep(POLL_SECONDS)
        self.check()

    def start_process(self, name: str, command: list[str]) -> None:
        """Start an additional process, with a log file of the same name."""
        self.processes.start(name, command, self.log(name), self.environment())

    def execute(
        self, run: Run, *settings: str, out: Path | None = None, config: Mapping[str, Scalar] = DEPLOYMENT_CONFIG
    ) -> Outcome:
        """Submit a run, wait for its end and read its outcome.

        Args:
            run: run to execute.
            settings: options of ``flwr run``.
            out: checkpoint file of the server, from which the run resumes; None: a temporary file.
            config: further run config of the ServerApp.

        Raises:
            UserError: raised by the ServerApp.
            FlowerRunError: any other failure.
        """
        number = self.num_runs + 1
        temporary = self.directory / f"outcome-{number}.safetensors"
        run_config = self.directory / f"run-{number}.toml"
        file = temporary if out is None else out.resolve()
        values = {"run": run.to_json(), "out": str(file), "timeout": self.timeout, "wait": self.wait, **config}
        values |= {"users": str(self.certificates.users.resolve())} if self.certificates else {}
        run_config.write_text(tomli_w.dumps(values))
        self.run_app(self.directory / "app", "--run-config", str(run_config), *settings)
        outcome = load_outcome(file, run)
        temporary.unlink(missing_ok=True)
        return outcome

    def run_app(self, app: Path, *settings: str) -> Path:
        """Submit any app and wait for its end.

        Args:
            app: directory of the app.
            settings: options of ``flwr run``.

        Returns:
            The log file of the run.

        Raises:
            UserError: raised by the ServerApp.
            FlowerRunError: any other failure.
        """
        self.num_runs += 1
        name = f"run-{self.num_runs}"
        run_id = str(self.flwr("run", str(app), SUPERLINK_NAME, *settings)["run-id"])
        self._stream_log(run_id, name)
        status = self.flwr("list", SUPERLINK_NAME, "--run-id", run_id)["runs"][0]
        if status["status"] != "finished:completed":
            raise self._failure(name, status["status"], status["status-details"])
        return self.log(name)

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """JSON output of a ``flwr`` command.

        Raises:
            FlowerRunError: the command failed, or did not end in time.
        """
        try:
            done = subprocess.run(
                [script_path("flwr"), *arguments, "--format", "json"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env=self.environment(),
                start_new_session=True,
                timeout=COMMAND_SECONDS,
            )
        except subprocess.TimeoutExpired:
            text = f"flwr {arguments[0]} did not end within {COMMAND_SECONDS:g} s"
            raise FlowerRunError(f"{text}\n{self.tail('superlink')}") from None
        with suppress(json.JSONDecodeError):
            result = json.loads(done.stdout)
            if result.get("success"):
                return dict(result)
        output = f"{done.stdout}\n{done.stderr}".strip()
        raise FlowerRunError(f"flwr {arguments[0]} failed: {output}\n{self.tail('superlink')}")

    def check(self) -> None:
        """Check that all started processes are running.

        Raises:
            FlowerRunError: a process has exited.
        """
        for name, process in self.processes.started.items():
            if process.poll() is not None:
                raise FlowerRunError(f"Flower's {name} has exited\n{self.tail(name)}")

    def environment(self) -> dict[str, str]:
        """Environment variables of its processes and of ``flwr`` commands."""
        # The Ray cluster of the caller is not used; other variables, such as caches, are passed on to the workers.
        inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")}
        own = {
            "FLWR_HOME": str(self.directory / "home"),
            "TMPDIR": str(self.directory / "tmp"),
            "RAY_TMPDIR": str(self.directory / "tmp"),
            GROUP_VARIABLE: self.processes.id,  # `flwr` commands also belong to the group
            "PATH": os.pathsep.join([scripts_path(), os.environ.get("PATH", os.defpath)]),
        }
        return inherited | ENVIRONMENT | own | self.extra_environment

    def log(self, name: str) -> Path:
        """Log file of a process or a run."""
        return self.directory / f"{name}.log"

    def tail(self, name: str) -> str:
        """Last lines of the log of a process or a run."""
        return "\n".join(self._read_log(name).splitlines()[-TAIL_LINES:])

    def _stream_log(self, run_id: str, name: str) -> None:
        """Copy the log of a run to a file until the run ends."""
        command = [script_path("flwr"), "log", run_id, SUPERLINK_NAME, "--stream"]
        with self.log(name).open("wb") as log:
            stream = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,
            )
            try:
                while stream.poll() is None:
                    self.check()
                    self.processes.live_pids()
                    time.sleep(POLL_SECONDS)
            finally:
                stream.kill()
                stream.wait()

    def _failure(self, name: str, status: str, details: str) -> Exception:
        cause = re.sub(r"^(Simulation|ServerApp) failed with exception: ", "", _plain(details)).strip()
        first, *_ = cause.splitlines() or [""]
        log = self._read_log(name)
        for kind in (ClientError, InvalidReply, UserError):
            if f"{kind.__module__}.{kind.__qualname__}: {first}" in log:
                return kind(cause)
        return FlowerRunError(f"Flower's run: {status}: {cause}\n{self.tail(name)}")

    def _read_log(self, name: str) -> str:
        return _plain(self.log(name).read_text(errors="replace"))

    def _flower_config(self) -> dict[str, Any]:
        """Content of Flower's configuration file, with this SuperLink only."""
        tls = {"root-certificates": str(self.certificates.root)} if self.certificates else {"insecure": True}
        return {"superlink": {"default": SUPERLINK_NAME, SUPERLINK_NAME: {"address": f"{HOST}:{self.port}"} | tls}}

    def _is_healthy(self) -> bool:
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        scheme = "http"
        if self.certificates:
            scheme = "https"
            context = ssl.create_default_context(cafile=str(self.certificates.root))
            handlers.append(urllib.request.HTTPSHandler(context=context))
        opener = urllib.request.build_opener(*handlers)
        try:
            with opener.open(f"{scheme}://{HOST}:{self.port}/health", timeout=2):
                return True
        except OSError:
            return False


def _write_app(directory: Path) -> None:
    directory.mkdir()
    (directory / "pyproject.toml").write_text(tomli_w.dumps(APP_CONFIG))
    # The path of a console script lacks the working directory, which may contain the user's models.
    paths = [path or os.getcwd() for path in [*sys.path, ""]]
    for name, module in MODULES.items():
        (directory / name).write_text(MODULE_TEMPLATE.format(paths=paths, module=module))


def _plain(text: str) -> str:
    """Remove the color codes of a terminal, literal or escaped."""
    return re.sub(r"(\x1b|\\x1b)\[[0-9;]*m", "", text)
