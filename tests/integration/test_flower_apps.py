"""Apps that do not know fedbn, with its mod and wrapper, in Flower's own simulation."""

from __future__ import annotations

import pytest
import torch

from fedbn_clients.mods import normalization
from fedbn_simulations.flower import strategies
from tests.flower_apps import Net, message_app, server_app, simulate
from tests.helpers import PYTHONPATH


@pytest.mark.ray
def test_mod_and_wrapper_give_the_same_results_on_ray(monkeypatch):
    import ray
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    ray.shutdown()  # Flower would use a session that an earlier simulation in this process has left
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)  # Flower extends it for the rest of the process
    norms = "fedbn-seeded"  # entries are stored, sent, and pooled

    def app():
        # Ray's nodes connect one by one, and the first round takes a share of those that are connected.
        everyone = FedAvg(min_available_nodes=3, min_train_nodes=3, min_evaluate_nodes=3)
        return server_app(strategies.normalization(everyone, Net, norms), rounds=2)

    def client():
        # Ray pickles the app; a lambda has no name by which it could be imported.
        return message_app([normalization(lambda: Net(), norms)])

    in_process, on_ray = app(), app()
    simulate(in_process, client())
    resources = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 1, "include_dashboard": False}}
    run_simulation(on_ray, client(), num_supernodes=3, backend_config=resources)
    # Flower aggregates in the order of the replies, which is random on Ray.
    errors = [x.result.evaluate_metrics_clientapp[2]["error"] for x in (in_process, on_ray)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    a, b = (dict(x.result.arrays.to_torch_state_dict()) for x in (in_process, on_ray))
    assert list(a) == list(b)
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5)
