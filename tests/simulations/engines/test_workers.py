"""Worker processes survive failures, may start processes of their own, and leave none behind."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import psutil
import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from torch.utils.data import DataLoader, TensorDataset

from fedbn_simulations.engines.simulation import run_simulation
from tests.helpers import ROOT, wait_until
from tests.simulations.engines.calls import reply, simulate, slow_second

pytestmark = pytest.mark.slow  # a worker process starts in a second


def dies(message, context):
    if context.node_config["partition-id"] == 0:
        os._exit(3)
    return slow_second(message, context)


def test_process_backend_survives_death_and_timeout():
    found = simulate(dies, 3, "processes", {"client_timeout": 0.5, "num_workers": 1})
    assert found == [
        ["the worker process ended with exit code 3", "no reply after 0.5 seconds, the limit for each client", 0]
    ]


def test_app_that_cannot_be_loaded_in_a_worker_process_fails_at_each_client():
    class App(ClientApp):
        def __reduce__(self):
            return int, ("not a number",)

    found = []

    def server(grid, context):
        messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
        found.extend(r.error.reason for r in grid.send_and_receive(messages))

    run_simulation(server, App(), 2, "processes", {"num_workers": 1})
    assert found == ["the worker process ended with exit code 1"] * 2


def test_worker_processes_see_the_current_environment(monkeypatch):
    def environment(message, context):
        return reply(message, os.environ["FEDBN_TEST_VALUE"])

    for value in ("1", "2"):
        monkeypatch.setenv("FEDBN_TEST_VALUE", value)
        assert simulate(environment, 1, "processes") == [[value]]


def load_data(message, context):
    data = TensorDataset(torch.arange(6.0))
    total = sum(float(x.sum()) for (x,) in DataLoader(data, batch_size=2, num_workers=2))
    return reply(message, f"{total:g}, {multiprocessing.get_start_method()}")


def test_clients_in_worker_processes_may_use_data_loaders_with_processes():
    expected = f"15, {multiprocessing.get_start_method()}"  # Lightning takes minutes if workers of loaders are spawned
    assert simulate(load_data, 2, "processes", {"num_workers": 1}, rounds=2) == [[expected] * 2] * 2


def start_sleep(message, context):
    return reply(message, subprocess.Popen(["sleep", "300"]).pid)


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(not hasattr(os, "setpgrp"), reason="needs process groups")
def test_processes_that_clients_start_end_with_the_simulation():
    ((pid, other),) = simulate(start_sleep, 2, "processes", {"num_workers": 2})
    assert wait_until(lambda: not any(map(is_running, [pid, other])), 10)


KILLED = """
import os, subprocess, time
from flwr.app import Message
from tests.simulations.engines.calls import reply, simulate
def client(message, context):
    print(os.getpid(), subprocess.Popen(["sleep", "300"]).pid, flush=True)
    time.sleep(300)
if __name__ == "__main__":
    simulate(client, 1, "processes")
"""


@pytest.mark.skipif(not hasattr(os, "setpgrp"), reason="needs process groups")
def test_worker_processes_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "clients", ROOT / "simulations")))}
    with subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(is_running, pids))
        parent.kill()
    assert wait_until(lambda: not any(map(is_running, pids)), 10)
