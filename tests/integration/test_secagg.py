"""Flower's SecAgg+ together with the mod of normalization, in this process."""

from __future__ import annotations

import logging

import torch
from flwr.client.mod import secaggplus_mod
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_PARAMS_RECORD

from fedbn_clients.mods import NORMALIZATION_STATE, normalization
from fedbn_simulations.engines.simulation import run_simulation
from tests.flower_apps import Net, initial_state, numpy_client_app
from tests.helpers import same

NODES = 3
COUNTER = "num_batches_tracked"
"""SecAgg+ returns wrong values for zero-dimensional arrays."""
QUANTUM = 16 / 2**22
"""Smallest difference of two masked numbers between -8 and 8."""


def train(mods, secure, rounds=2, options=None):
    """Final arrays at the server by name, and the last entries of each client by partition."""
    found, own = {}, {}
    client = numpy_client_app(mods)

    def remember(message, context):
        reply = client(message, context)
        if NORMALIZATION_STATE in context.state:
            own[context.node_config["partition-id"]] = context.state[NORMALIZATION_STATE].to_torch_state_dict()
        return reply

    def server(grid, context):
        strategy = FedAvg(
            fraction_evaluate=0.0,
            min_available_clients=NODES,
            min_fit_clients=NODES,
            initial_parameters=ndarrays_to_parameters([v.numpy() for v in initial_state().values()]),
        )
        legacy = LegacyContext(context, config=ServerConfig(num_rounds=rounds), strategy=strategy)
        masked = SecAggPlusWorkflow(num_shares=NODES, reconstruction_threshold=2, max_weight=48, **(options or {}))
        DefaultWorkflow(fit_workflow=masked if secure else None)(grid, legacy)
        arrays = legacy.state.array_records[MAIN_PARAMS_RECORD].to_numpy_ndarrays()
        found.update(zip(initial_state(), map(torch.as_tensor, arrays), strict=True))

    run_simulation(server, remember, NODES)
    return found, own


def test_secagg_with_normalization_inside_gives_fedbn():
    norms = normalization(Net, "fedbn")
    masked, own = train([secaggplus_mod, norms], secure=True, rounds=1)
    plain, expected = train([norms], secure=False, rounds=1)
    assert set(own) == set(expected) == set(range(NODES))
    for partition, entries in expected.items():
        assert same(own[partition], entries)
        assert not same({k: initial_state()[k] for k in entries}, entries)
    for name, value in plain.items():
        if not name.endswith(COUNTER):
            torch.testing.assert_close(masked[name].float(), value.float(), rtol=0, atol=4 * QUANTUM)


def test_secagg_leaves_local_entries_to_the_clients_in_later_rounds():
    masked, own = train([secaggplus_mod, normalization(Net, "fedbn")], secure=True)
    for name, value in initial_state().items():
        if name.startswith("scaler") and not name.endswith(COUNTER):
            torch.testing.assert_close(masked[name].float(), value, rtol=0, atol=8 * QUANTUM)
    assert [int(own[i][f"scaler.{COUNTER}"]) for i in range(NODES)] == [12] * NODES


def test_secagg_inside_normalization_stops_with_one_sentence(caplog):
    with caplog.at_level(logging.ERROR, "flwr"):
        logging.getLogger("flwr").propagate = True
        masked, own = train([normalization(Net, "fedbn"), secaggplus_mod], secure=True, rounds=1)
    assert "use mods=[secaggplus_mod, normalization]" in caplog.text
    assert not own
    for name, value in initial_state().items():
        assert torch.equal(masked[name], value)


def test_secagg_clips_statistics_that_travel():
    """Running variances above the clipping range are cut silently; local ones are not sent."""
    fedavg, fedbn = (normalization(Net, name) for name in ("fedavg", "fedbn"))
    options = {"clipping_range": 1.5}
    plain, _ = train([fedavg], secure=False, rounds=1)
    masked, _ = train([secaggplus_mod, fedavg], secure=True, rounds=1, options=options)
    assert float(plain["scaler.running_var"].max()) > 5
    assert float(masked["scaler.running_var"].max()) < 1.51
    _, own = train([secaggplus_mod, fedbn], secure=True, rounds=1, options=options)
    assert max(float(entries["scaler.running_var"].max()) for entries in own.values()) > 5
