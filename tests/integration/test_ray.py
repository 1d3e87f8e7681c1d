"""Flower's own simulation is bit-identical, reports how a run ended, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
import uuid
from pathlib import Path

import pytest

from fedbn.errors import UserError
from fedbn.federation.failures import LOG_VARIABLE, ClientError
from fedbn.federation.run import Run, plan_for
from fedbn.strategies.base import strategies
from fedbn_clients.app import app as client_app
from fedbn_clients.config import run_from_config
from fedbn_simulations.engines.deployment import differences
from fedbn_simulations.engines.execute import execute
from fedbn_simulations.engines.grid import InProcessGrid
from fedbn_simulations.engines.ray import ray_session
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.flower.superlink import ENVIRONMENT, MODULES
from fedbn_simulations.server.nodes import NodePool
from fedbn_simulations.storage.checkpoint import load_outcome
from tests.fedbn.tasks.populations import MODELS as MODELS_OF_TASKS
from tests.fedbn.tasks.stacked_table import task_run
from tests.helpers import ROOT, wait_until
from tests.integration.processes import MARK, kill_marked, marked
from tests.integration.ray_server import RUNS
from tests.simulations.engines.test_engines import QUICK

MODELS = """
import os
import sys

from torch import nn

from fedbn.errors import UserError


def plain(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, classes))


def rejected_by_server(shape, classes):
    if "FLWR_HOME" in os.environ:
        raise UserError(f"cache {os.environ['FEDBN_CACHE']} is not mine\\nuse another")
    return plain(shape, classes)


def broken_at_clients(shape, classes):
    if "worker" in sys.argv[0]:
        raise ZeroDivisionError("a bug in the model")
    return plain(shape, classes)
"""


def short_run(strategy, training=None, **fields):
    clients = None if strategies()[strategy].is_centralized else 4
    plan = plan_for("digits8", rounds=2, clients_per_round=clients, eval_every=1, global_test=60, **(training or {}))
    return Run("digits8", strategy, plan=plan, **fields).resolved()


STRATEGIES = (*QUICK, "centralized", "fedap", "fednorm", "hbn", "static-bn")
"""Strategies with different messages; the grid has all of them (``test_engines.py``)."""


def all_runs():
    """Runs by name: strategies, personalization by online rules, other optimizers, and every task."""
    rules = {
        "population": short_run("global-naive", rule="population:diversity=1"),
        "ema": short_run("fedbn", rule="ema:rate=0.3"),
    }
    trained = {"optimizer": "adam", "optimizer_state": "keep", "max_grad_norm": 0.5, "augment": "translate+jitter"}
    other = {"optimizer": "torch.optim:Adagrad", "optimizer_state": "keep", "schedule": "cosine", "warmup": 1}
    optimizers = {"adam": short_run("fedbn", trained), "factory": short_run("fedbn", other)}
    tasks = {task: task_run(task, "adamw", optimizer_state="keep") for task in MODELS_OF_TASKS}
    return {name: short_run(name) for name in STRATEGIES} | rules | optimizers | tasks


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory):
    """A function that executes runs on one SuperLink, started in a directory with the user's models."""
    directory, mark = tmp_path_factory.mktemp("elsewhere"), uuid.uuid4().hex
    (directory / "ray_models.py").write_text(MODELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.syspath_prepend(directory)
        patch.setenv(MARK, mark)
        patch.setenv("FEDBN_CACHE", str(directory / "cache"))
        patch.setenv(LOG_VARIABLE, str(directory / "clients.log"))
        with ray_session(actors=1) as execute_on_ray:  # a second actor would cost more at startup than it saves
            started = marked(mark)
            yield execute_on_ray
    assert started
    assert not marked(mark)
    homes = [Path(environment["FLWR_HOME"]) for environment in started.values() if "FLWR_HOME" in environment]
    assert homes  # the guardian process has no home
    assert not any(home.exists() for home in homes)


@pytest.fixture(scope="module")
def all_on_ray(tmp_path_factory):
    """A function that returns the outcome of a run; all runs were executed in one simulation."""
    directory, runs = tmp_path_factory.mktemp("all"), all_runs()
    (directory / RUNS).write_text(json.dumps({name: run.to_json() for name, run in runs.items()}))
    last = list(runs)[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODULES, "fedbn_run_server.py", "tests.integration.ray_server")
        patch.setitem(MODULES, "fedbn_run_client.py", "tests.integration.ray_client")
        with ray_session() as execute_on_ray:
            execute_on_ray(runs[last], directory / f"{last}.safetensors")
    return lambda name: load_outcome(directory / f"{name}.safetensors", runs[name])


@pytest.mark.ray
@pytest.mark.xdist_group("all-on-ray")
@pytest.mark.parametrize("name", all_runs())
def test_ray_matches_grid(name, all_on_ray):
    run = all_runs()[name]
    outcome = all_on_ray(name)
    assert differences(outcome, execute(run, "grid")) == ()
    assert not outcome.client_states


@pytest.mark.ray
@pytest.mark.xdist_group("on-ray")
def test_ray_raises_user_errors_of_server(on_ray):
    with pytest.raises(UserError, match=r"cache .*elsewhere.*/cache is not mine\nuse another") as caught:
        on_ray(short_run("fedbn", model="ray_models:rejected_by_server"))
    assert "Traceback" not in str(caught.value)


@pytest.mark.ray
@pytest.mark.xdist_group("on-ray")
def test_ray_run_reports_client_error(on_ray):
    with pytest.raises(ClientError, match=r"^train, user \d: UserError \(code 101: .*\)"):
        on_ray(short_run("fedbn", model="ray_models:broken_at_clients"))
    assert "ZeroDivisionError: a bug in the model" in Path("clients.log").read_text()


@pytest.mark.ray
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_ray_run_leaves_nothing_behind(signum, mark, tmp_path):
    script = tmp_path / "long.py"
    script.write_text(
        "import signal\nfrom fedbn.federation.run import Run, plan_for\n"
        "from fedbn_simulations.engines.execute import execute\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs of a shell ignore it
        "execute(Run('digits8', 'fedbn', plan=plan_for('digits8', rounds=10_000)).resolved(), 'ray')\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def is_running():
        assert process.poll() is None
        return any("RAY_JOB_ID" in e or "RAY_RAYLET_PID" in e for e in marked(mark).values())

    assert wait_until(is_running)
    homes = {Path(e["FLWR_HOME"]) for e in marked(mark).values() if "FLWR_HOME" in e}
    process.send_signal(signum)
    time.sleep(1)
    process.send_signal(signum)  # as impatient users do
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not output
    assert not marked(mark)
    assert homes
    assert not any(home.parent.exists() for home in homes)


@pytest.mark.ray
def test_flwr_run_works_in_checkout(mark, tmp_path):
    checkout, out = tmp_path / "checkout", tmp_path / "out.st"
    for package in ("fedbn", "clients", "simulations"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, checkout / name)
    scripts = sysconfig.get_path("scripts")
    environment = os.environ | ENVIRONMENT
    environment |= {"FLWR_HOME": str(tmp_path / "home"), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] = str(23_000 + os.getpid() % 9_000)
    settings = {"strategy": "silobn", "plan": "rounds=2,clients-per-round=4,eval-every=1,global-test=60"}
    config = " ".join(f'{k}="{v}"' for k, v in (settings | {"out": str(out)}).items())
    command = [shutil.which("flwr", path=scripts), "run", ".", "--stream", "--run-config", config]
    command += ["--federation-config", "num-supernodes=10 client-resources-num-cpus=1"]
    try:
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=180)
    finally:
        kill_marked(mark)  # Flower leaves its SuperLink running
    assert out.exists(), done.stdout + done.stderr
    run = run_from_config({"scenario": "digits8", **settings})
    assert differences(load_outcome(out, run), execute(run, "grid")) == ()
    assert (checkout / "pyproject.toml").read_bytes() == (ROOT / "pyproject.toml").read_bytes()


def test_app_config_names_run_and_includes_all_code():
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert run_from_config(app["config"]) == Run("digits8", "fedbn", plan=plan_for("digits8")).resolved()
    assert all(any(ROOT.glob(pattern)) for pattern in app["fab-include"])


def test_node_pool_rejects_too_few_nodes():
    grid = InProcessGrid(client_app, 2, {})
    with task_identity(1), pytest.raises(UserError, match="add --federation-config 'num-supernodes=10' to flwr run"):
        NodePool(grid, 10)
