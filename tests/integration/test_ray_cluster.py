"""Difficult cases on Ray: a server that is killed during a run, and an existing cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fedbn.errors import UserError
from fedbn.federation.run import Run, plan_for
from fedbn_simulations.engines.deployment import differences
from fedbn_simulations.engines.execute import execute, parse_engine
from fedbn_simulations.experiments.tasks import CHECKPOINT, Task, run_task
from fedbn_simulations.flower.processes import free_port, script_path
from fedbn_simulations.storage.checkpoint import load_outcome
from tests.helpers import wait_until
from tests.integration.processes import kill_marked, kill_server_of


def short_run(rounds):
    plan = plan_for("digits8", rounds=rounds, eval_every=rounds, global_test=60, optimizer_state="keep", momentum=0.5)
    return Run("digits8:users=3:unseen=1", "fedbn", plan=plan).resolved()


@pytest.mark.ray
def test_ray_run_resumes_after_server_kill(mark, tmp_path):
    run, directory = short_run(40), tmp_path / "runs" / "x"

    def execute_on_ray():
        run_task(Task(run, str(directory)), "ray", lambda event: None)

    kill_server_of(execute_on_ray, mark, "flwr-simulation", directory / CHECKPOINT)
    assert 1 <= len(load_outcome(directory / CHECKPOINT, run).curve) < 40
    assert any((directory / "states").iterdir())
    execute_on_ray()
    assert differences(load_outcome(directory / CHECKPOINT, run), execute(run, "grid")) == ()
    assert sorted(p.name for p in directory.iterdir()) == [CHECKPOINT, "result.json"]


@pytest.mark.ray
def test_ray_run_uses_existing_cluster(mark, tmp_path):
    port, states = free_port(), tmp_path / "states"
    directory = Path("/tmp") / f"fb-{os.getpid()}"  # Ray's sockets need short_run paths
    command = [script_path("ray"), "start", "--head", f"--port={port}", "--num-cpus=1", "--include-dashboard=false"]
    command += ["--node-ip-address=127.0.0.1", f"--temp-dir={directory}", "--disable-usage-stats", "--block"]
    # Only the workers of the cluster have this directory, so its files were written by them.
    log = tmp_path / "log"
    with log.open("wb") as file:
        cluster = subprocess.Popen(command, env=os.environ | {"FEDBN_STATES": str(states)}, stdout=file, stderr=file)
    try:
        assert wait_until(lambda: b"Ray runtime started" in log.read_bytes() or cluster.poll() is not None)
        assert cluster.poll() is None, log.read_text()
        run = short_run(2)
        assert differences(execute(run, f"ray:127.0.0.1:{port}"), execute(run, "grid")) == ()
        assert len(list(states.iterdir())) == 2
        assert cluster.poll() is None
    finally:
        cluster.terminate()
        cluster.wait(60)
        kill_marked(mark)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.parametrize("text", ["ray:", "ray:nowhere", "ray:a b:1", "ray:host:port"])
def test_parse_engine_rejects_bad_ray_address(text):
    with pytest.raises(UserError, match="a Ray cluster is addressed as ray:HOST:PORT"):
        parse_engine(text)


def test_parse_engine_accepts_ray_addresses():
    assert [parse_engine(t) for t in ("ray", "ray:auto", "ray:10.0.0.1:6379")] == [("ray", "exact")] * 3
