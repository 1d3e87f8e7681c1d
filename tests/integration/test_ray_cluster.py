"""Ray where it is hard: a server that is killed in a run, and a cluster that others have started."""

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
from simulations.flower.processes import free_port, script
from simulations.flower.superlink import FlowerRunError
from simulations.storage.checkpoint import load_outcome
from tests.integration.test_ray import MARK, assert_same, kill, marked


def short(rounds):
    plan = plan_for("digits8", rounds=rounds, eval_every=rounds, global_test=60, optimizer_state="keep", momentum=0.5)
    return Run("digits8:users=3:unseen=1", "fedbn", plan=plan).resolved()


@pytest.fixture
def mark(monkeypatch):
    """A mark that all processes of a test inherit; none of them may be left."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield mark
    monkeypatch.delenv(MARK)
    left = marked(mark)
    kill(mark)
    assert not left


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
def test_a_run_on_ray_whose_server_is_killed_goes_on_to_the_same_bits(mark, tmp_path):
    run, place = short(40), tmp_path / "runs" / "x"
    raised = []

    def first():
        try:
            run_task(Task(run, str(place)), "ray", lambda event: None)
        except FlowerRunError as error:
            raised.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    deadline = time.monotonic() + 400
    while not (place / CHECKPOINT).exists() and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in list(simulations(mark)):
        os.kill(pid, signal.SIGKILL)
    thread.join(400)
    assert raised
    assert 1 <= len(load_outcome(place / CHECKPOINT, run).curve) < 40
    assert any((place / "states").iterdir())
    run_task(Task(run, str(place)), "ray", lambda event: None)
    assert_same(load_outcome(place / CHECKPOINT, run), execute(run, "grid"))
    assert sorted(p.name for p in place.iterdir()) == [CHECKPOINT, "result.json"]


@pytest.mark.ray
def test_a_ray_cluster_that_is_there_already_serves_the_clients(mark, tmp_path):
    port, states = free_port(), tmp_path / "states"
    place = Path("/tmp") / f"fb-{os.getpid()}"  # Ray's sockets need short paths
    command = [script("ray"), "start", "--head", f"--port={port}", "--num-cpus=1", "--include-dashboard=false"]
    command += ["--node-ip-address=127.0.0.1", f"--temp-dir={place}", "--disable-usage-stats", "--block"]
    # Only the cluster's workers know of this directory: what is in it was written by them.
    with (tmp_path / "log").open("wb") as log:
        cluster = subprocess.Popen(command, env=os.environ | {"FEDBN_STATES": str(states)}, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while b"Ray runtime started" not in (tmp_path / "log").read_bytes():
            assert cluster.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        run = short(2)
        assert_same(execute(run, f"ray:127.0.0.1:{port}"), execute(run, "grid"))
        assert len(list(states.iterdir())) == 2
        assert cluster.poll() is None
    finally:
        cluster.terminate()
        cluster.wait(60)
        kill(mark)
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.parametrize("text", ["ray:", "ray:nowhere", "ray:a b:1", "ray:host:port"])
def test_an_address_that_is_none(text):
    with pytest.raises(UserError, match="a Ray cluster is addressed as ray:HOST:PORT"):
        parse_engine(text)


def test_addresses():
    assert [parse_engine(t) for t in ("ray", "ray:auto", "ray:10.0.0.1:6379")] == [("ray", "exact")] * 3
