"""Difficult cases on Ray: a server that is killed during a run, and an existing cluster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
import uuid
from pathlib import Path

import pytest

from fedbn.errors import UserError
from fedbn.federation.run import Run, plan_for
from simulations.engines.execute import execute, parse_engine
from simulations.experiments.tasks import CHECKPOINT, Task, run_task
from simulations.flower.processes import free_port, script_path
from simulations.flower.superlink import FlowerRunError
from simulations.storage.checkpoint import load_outcome
from tests.integration.test_ray import MARK, assert_same, kill, marked


def short_run(rounds):
    plan = plan_for("digits8", rounds=rounds, eval_every=rounds, global_test=60, optimizer_state="keep", momentum=0.5)
    return Run("digits8:users=3:unseen=1", "fedbn", plan=plan).resolved()


@pytest.fixture
def mark(monkeypatch):
    """A mark that all processes of a test inherit; no such process may outlive the test."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield mark
    monkeypatch.delenv(MARK)
    remaining = marked(mark)
    kill(mark)
    assert not remaining


def simulations(mark):
    """Processes in which Flower runs the server of a simulation."""
    for pid in marked(mark):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if "flwr-simulation" in command:
            yield pid


@pytest.mark.ray
def test_ray_run_resumes_after_server_kill(mark, tmp_path):
    run, directory = short_run(40), tmp_path / "runs" / "x"
    errors = []

    def run_until_killed():
        try:
            run_task(Task(run, str(directory)), "ray", lambda event: None)
        except FlowerRunError as error:
            errors.append(error)

    thread = threading.Thread(target=run_until_killed)
    thread.start()
    deadline = time.monotonic() + 400
    while not (directory / CHECKPOINT).exists() and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in list(simulations(mark)):
        os.kill(pid, signal.SIGKILL)
    thread.join(400)
    assert errors
    assert 1 <= len(load_outcome(directory / CHECKPOINT, run).curve) < 40
    assert any((directory / "states").iterdir())
    run_task(Task(run, str(directory)), "ray", lambda event: None)
    assert_same(load_outcome(directory / CHECKPOINT, run), execute(run, "grid"))
    assert sorted(p.name for p in directory.iterdir()) == [CHECKPOINT, "result.json"]


@pytest.mark.ray
def test_ray_run_uses_existing_cluster(mark, tmp_path):
    port, states = free_port(), tmp_path / "states"
    directory = Path("/tmp") / f"fb-{os.getpid()}"  # Ray's sockets need short_run paths
    command = [script_path("ray"), "start", "--head", f"--port={port}", "--num-cpus=1", "--include-dashboard=false"]
    command += ["--node-ip-address=127.0.0.1", f"--temp-dir={directory}", "--disable-usage-stats", "--block"]
    # Only the workers of the cluster have this directory, so its files were written by them.
    with (tmp_path / "log").open("wb") as log:
        cluster = subprocess.Popen(command, env=os.environ | {"FEDBN_STATES": str(states)}, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while b"Ray runtime started" not in (tmp_path / "log").read_bytes():
            assert cluster.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        run = short_run(2)
        assert_same(execute(run, f"ray:127.0.0.1:{port}"), execute(run, "grid"))
        assert len(list(states.iterdir())) == 2
        assert cluster.poll() is None
    finally:
        cluster.terminate()
        cluster.wait(60)
        kill(mark)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.parametrize("text", ["ray:", "ray:nowhere", "ray:a b:1", "ray:host:port"])
def test_parse_engine_rejects_bad_ray_address(text):
    with pytest.raises(UserError, match="a Ray cluster is addressed as ray:HOST:PORT"):
        parse_engine(text)


def test_parse_engine_accepts_ray_addresses():
    assert [parse_engine(t) for t in ("ray", "ray:auto", "ray:10.0.0.1:6379")] == [("ray", "exact")] * 3
