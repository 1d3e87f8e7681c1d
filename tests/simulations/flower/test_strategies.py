from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
)

from fedbn.errors import UserError
from fedbn.nn.roles import statistics_layers
from fedbn.statistics.moments import pooled_variance
from fedbn.statistics.recalibration import recalibrate
from fedbn_clients.mods import normalization as client_normalization
from fedbn_simulations.flower.strategies import normalization
from tests.flower_apps import (
    Net,
    data,
    initial_state,
    local_error,
    message_app,
    node_context,
    send,
    server_app,
    simulate,
)

MEAN, VAR, COUNTER = "scaler.running_mean", "scaler.running_var", "scaler.num_batches_tracked"
STRATEGIES = {
    **{s.__name__: s for s in (FedAvg, FedAdam, FedYogi, FedMedian, FedTrimmedAvg, Krum)},
    "FedAvgM": lambda **options: FedAvgM(server_momentum=0.5, **options),
    "FedProx": lambda **options: FedProx(proximal_mu=0.1, **options),
    "QFedAvg": lambda **options: QFedAvg(client_learning_rate=0.1, **options),
    "MultiKrum": lambda **options: MultiKrum(num_nodes_to_select=2, **options),
}


def slow(value):
    """A parameter of a slow test: some of Flower's strategies collect garbage after every array."""
    return pytest.param(value, marks=pytest.mark.slow)


def small(name, **options):
    return STRATEGIES[name](min_available_nodes=3, **options)


def train(strategy, norms="global-pooled", rounds=1, mods=None, **options):
    """Final arrays of a short simulation, its result and the grid."""
    client = message_app(mods=[client_normalization(Net, norms)]) if mods is None else message_app(train_mods=mods)
    app = server_app(strategy, rounds=rounds, **options)
    grid = simulate(app, client)
    return dict(app.result.arrays.to_torch_state_dict()), app.result, grid


def one_round_at_clients(nodes=3):
    """What the clients send in the first round."""
    replies = []

    class Recorder(FedAvg):
        def aggregate_train(self, server_round, messages):
            messages = list(messages)
            replies.extend(dict(m.content["arrays"].to_torch_state_dict()) for m in messages)
            return super().aggregate_train(server_round, messages)

    simulate(
        server_app(Recorder(min_available_nodes=nodes), 1), message_app([client_normalization(Net, "fedavg")]), nodes
    )
    return replies


@pytest.mark.parametrize("name", [slow(name) if name == "QFedAvg" else name for name in STRATEGIES])
def test_statistics_are_pooled_and_parameters_are_left_to_the_strategy(name):
    wrapped, result, _ = train(normalization(small(name), Net, "global-pooled"))
    assert list(wrapped) == list(initial_state())
    assert {k: v.dtype for k, v in wrapped.items()} == {k: v.dtype for k, v in initial_state().items()}
    assert int(wrapped[COUNTER]) == 0
    assert set(result.train_metrics_clientapp[1]) == {"train_loss"}
    if name in ("Krum", "MultiKrum", "QFedAvg"):  # they depend on all entries together
        return
    plain, _, _ = train(small(name), norms="fedavg")
    for key, value in plain.items():
        if key not in (MEAN, VAR, COUNTER):
            torch.testing.assert_close(wrapped[key], value.float(), rtol=1e-5, atol=1e-6)  # FedAdam returns float64
    clients = one_round_at_clients()
    torch.testing.assert_close(wrapped[MEAN], torch.stack([c[MEAN] for c in clients]).mean(0))
    pooled = pooled_variance([c[MEAN] for c in clients], [c[VAR] for c in clients], [1] * 3)
    torch.testing.assert_close(wrapped[VAR], pooled)


def test_strategy_keeps_type_start_and_the_original_object():
    class Own(FedAdam):
        def start(self, grid, initial_arrays, **options):
            self.started = True
            return super().start(grid, initial_arrays, **options)

    original = Own(min_available_nodes=3)
    strategy = normalization(original, Net, "global-pooled")
    assert isinstance(strategy, Own)
    assert type(strategy).__name__ == "Own"
    train(strategy)
    assert strategy.started
    assert not hasattr(original, "started")
    assert original.current_arrays is None
    assert original.train_metrics_aggr_fn is not strategy.train_metrics_aggr_fn


@pytest.mark.parametrize("strategy", [Krum, lambda **o: MultiKrum(num_nodes_to_select=2, **o), slow(Bulyan)])
def test_statistics_are_those_of_the_selected_replies(strategy):
    """A client whose parameters are far from the others' is not selected, so its statistics do not count either."""
    attacked = ClientApp(mods=[client_normalization(Net, "global-naive")])

    @attacked.train()
    def train_attacked(message, context):
        state = dict(message.content["arrays"].to_torch_state_dict())
        first = context.node_config["partition-id"] == 0
        shift = 100.0 if first else 1e-3 * context.node_config["partition-id"]
        state = {k: v + shift if v.is_floating_point() else v for k, v in state.items()}
        metrics = MetricRecord({"num-examples": 10})
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    @attacked.evaluate()
    def evaluate(message, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 10})}), reply_to=message)

    app = server_app(
        normalization(strategy(num_malicious_nodes=0 if strategy is Bulyan else 1), Net, "global-naive"), 1
    )
    simulate(app, attacked, 5)
    shift = float(app.result.arrays.to_torch_state_dict()[MEAN][0])
    if strategy is Bulyan:  # it selects all replies if none is assumed to be malicious
        assert shift > 10
    else:
        assert 0 < shift < 0.01


def test_weights_are_the_examples_that_the_clients_report():
    client = ClientApp(mods=[client_normalization(Net, "global-naive")])

    @client.train()
    def train_unequal(message, context):
        partition = context.node_config["partition-id"]
        state = {k: torch.full_like(v, partition) for k, v in message.content["arrays"].to_torch_state_dict().items()}
        metrics = MetricRecord({"rows": 1 + 2 * partition})
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    strategy = normalization(FedAvg(weighted_by_key="rows", fraction_evaluate=0.0), Net, "global-naive")
    app = server_app(strategy, 1)
    simulate(app, client, 2)
    final = app.result.arrays.to_torch_state_dict()
    assert final[MEAN].tolist() == pytest.approx([0.75] * 6)
    assert final["scaler.weight"].tolist() == pytest.approx([0.75] * 6)


@pytest.mark.parametrize("norms", ["fedbn", "silobn", "mtfl:private=yb"])
def test_local_entries_stay_initial_at_the_server(norms):
    state, _, _ = train(normalization(FedAvg(min_available_nodes=3), Net, norms), norms, rounds=2)
    ownership = client_normalization(Net, norms)._entries.ownership
    for name, value in initial_state().items():
        local = ownership.owner(name) == "local"
        assert torch.equal(state[name], value) == local, name


def test_new_clients_start_from_the_pooled_statistics_of_the_seeded_ones():
    """Mean and variance of the population: mean of the clients' variances plus variance of their means."""
    state, _, grid = train(normalization(FedAvg(min_available_nodes=3), Net, "fedbn-seeded"), "fedbn-seeded", rounds=2)
    own = [dict(grid.partition_context(i).state["fedbn.normalization"].to_torch_state_dict()) for i in range(3)]
    torch.testing.assert_close(state[MEAN], torch.stack([o[MEAN] for o in own]).mean(0))
    torch.testing.assert_close(state[VAR], pooled_variance([o[MEAN] for o in own], [o[VAR] for o in own], [1] * 3))
    torch.testing.assert_close(state["scaler.bias"], torch.stack([o["scaler.bias"] for o in own]).mean(0))
    client, net = message_app([client_normalization(Net, "fedbn-seeded")]), Net()
    reply = send(client, "evaluate", RecordDict({"arrays": ArrayRecord(state)}), node_context(7))
    net.load_state_dict(state)
    assert reply.content["metrics"]["error"] == local_error(net, *data(7))


def test_recalibrated_statistics_are_the_moments_of_all_clients_data():
    def calibration(context):
        return data(context.node_config["partition-id"])[0].split(20)

    mod = client_normalization(Net, "global-recalibrated", calibration)
    app = server_app(normalization(FedAvg(min_available_nodes=3), Net, "global-recalibrated"), rounds=2)
    simulate(app, message_app([mod]))
    state = dict(app.result.arrays.to_torch_state_dict())
    model = Net()
    model.load_state_dict(state)
    recalibrate(model, torch.cat([data(i)[0] for i in range(3)]))
    for path, layer in statistics_layers(model).items():
        for name, value in layer.named_buffers(recurse=False):
            torch.testing.assert_close(state[f"{path}.{name}"], value, rtol=1e-4, atol=1e-5)


def test_synchronization_names_a_client_without_calibration():
    app = server_app(normalization(FedAvg(min_available_nodes=3), Net, "global-recalibrated"), 1)
    with pytest.raises(UserError, match=r"for evaluation and mods=\[normalization\(..., calibration=...\)\]"):
        simulate(app, message_app([client_normalization(Net, "global-naive")]))


# ---------------------------------------------------------------- what Flower's strategies do without the wrapper


def test_counters_become_floats_in_flower_and_stay_integers_here():
    plain, _, _ = train(FedAvg(min_available_nodes=3), mods=[])
    assert plain[COUNTER].dtype == torch.float64
    wrapped, _, _ = train(normalization(FedAvg(min_available_nodes=3), Net, "fedavg"), "fedavg")
    assert wrapped[COUNTER].dtype == torch.int64


@pytest.mark.slow
def test_qfedavg_needs_the_wrapper():
    with pytest.raises((AggregationError, TypeError)):
        train(small("QFedAvg"), norms="fedbn")


# ---------------------------------------------------------------- differential privacy


def private(cls=DifferentialPrivacyServerSideFixedClipping, **options):
    core = FedAvg(min_available_nodes=3)
    if cls is DifferentialPrivacyServerSideAdaptiveClipping:
        return cls(core, noise_multiplier=0.1, num_sampled_clients=3, clipped_count_stddev=10.0)
    return cls(core, noise_multiplier=0.5, clipping_norm=1.0, num_sampled_clients=3)


@pytest.mark.parametrize(
    "cls", [DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyServerSideAdaptiveClipping]
)
@pytest.mark.parametrize("norms", ["fedbn", "silobn"])
def test_noise_lands_on_parameters_only(cls, norms):
    state, _, _ = train(normalization(private(cls), Net, norms), norms, rounds=2)
    initial = initial_state()
    assert torch.equal(state[VAR], initial[VAR])
    assert not torch.equal(state["first.weight"], initial["first.weight"])
    assert torch.equal(state["scaler.weight"], initial["scaler.weight"]) == (norms == "fedbn")


def test_without_the_wrapper_noise_lands_on_local_entries_of_the_server_too():
    state, _, _ = train(private(), "fedbn")
    assert not torch.equal(state[VAR].float(), initial_state()[VAR])


def test_client_side_clipping_works_with_the_mod_inside():
    strategy = normalization(private(DifferentialPrivacyClientSideFixedClipping), Net, "fedbn")
    mods = [fixedclipping_mod, client_normalization(Net, "fedbn")]
    client = message_app(train_mods=mods)
    client._registered_funcs["evaluate.default"] = message_app([mods[1]])._registered_funcs["evaluate.default"]
    app = server_app(strategy, rounds=2)
    simulate(app, client)
    assert torch.equal(app.result.arrays.to_torch_state_dict()[VAR], initial_state()[VAR])
    assert 2 in app.result.evaluate_metrics_clientapp


def test_differential_privacy_with_traveling_statistics_is_refused():
    with pytest.raises(UserError, match="'global-pooled' sends clients' statistics.*such as silobn or fedbn"):
        normalization(private(), Net, "global-pooled")


def test_noise_outside_of_normalization_is_detected():
    inner = normalization(FedAvg(min_available_nodes=3), Net, "fedbn")
    outer = DifferentialPrivacyServerSideFixedClipping(inner, 0.5, 1.0, 3)
    with pytest.raises(UserError, match="scaler.* changed outside of normalization.*outermost"):
        train(outer, "fedbn", rounds=2)


# ---------------------------------------------------------------- warnings and errors


@pytest.fixture
def warnings(caplog):
    """A function that returns the warnings of the log."""
    caplog.set_level(logging.WARNING)
    return lambda: [r.message for r in caplog.records if r.message.startswith("normalization:")]


def test_evaluation_at_the_server_is_questioned_if_entries_are_local(warnings):
    def evaluate(server_round, arrays):
        return None

    train(normalization(FedAvg(min_available_nodes=3), Net, "fedbn-seeded"), "fedbn-seeded", evaluate_fn=evaluate)
    assert not warnings()
    train(normalization(FedAvg(min_available_nodes=3), Net, "fedbn"), "fedbn", evaluate_fn=evaluate)
    assert "under fedbn, local entries" in warnings()[0]


def test_client_without_the_mod_is_reported(warnings):
    train(normalization(FedAvg(min_available_nodes=3), Net, "fedbn"), "fedbn")
    assert not warnings()
    train(normalization(FedAvg(min_available_nodes=3), Net, "fedbn"), mods=[])
    assert "a client sent its own value of scaler." in warnings()[0]


def test_local_noise_outside_the_mod_does_not_reach_local_entries_of_the_server():
    mods = [LocalDpMod(5.0, 0.1, 1.0, 0.5), client_normalization(Net, "fedbn")]
    client = message_app(train_mods=mods)
    app = server_app(normalization(FedAvg(min_available_nodes=3, fraction_evaluate=0.0), Net, "fedbn"), rounds=2)
    simulate(app, client)
    assert torch.equal(app.result.arrays.to_torch_state_dict()[VAR], initial_state()[VAR])


def test_errors_name_mistake_and_fix():
    with pytest.raises(UserError, match=r"not a strategy of flwr.serverapp.strategy: .* fedbn_clients.mods"):
        normalization(LegacyFedAvg(), Net, "fedbn")
    once = normalization(FedAvg(), Net, "fedbn")
    for again in (once, DifferentialPrivacyServerSideFixedClipping(once, 0.5, 1.0, 3)):
        with pytest.raises(UserError, match="wrapped by normalization already"):
            normalization(again, Net, "fedbn")
    with pytest.raises(UserError, match="strategy 'groupnorm' replaces layers"):
        normalization(FedAvg(), Net, "groupnorm")


@pytest.mark.parametrize("lacking", ["first.weight", VAR])
def test_incomplete_replies_are_refused(lacking):
    client = ClientApp()

    @client.train()
    def train_partly(message, context):
        state = {k: v for k, v in message.content["arrays"].to_torch_state_dict().items() if k != lacking}
        content = {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    app = server_app(normalization(FedAvg(fraction_evaluate=0.0), Net, "global-pooled"), 1)
    with pytest.raises(UserError, match=f"a client's reply lacks {lacking}: let the app return all arrays"):
        simulate(app, client, 2)


def test_arrays_without_names_are_matched_by_position():
    client = ClientApp(mods=[client_normalization(Net, "fedbn")])

    @client.train()
    def train_by_position(message, context):
        values = [np.asarray(v + 1, v.dtype) for v in message.content["arrays"].to_numpy_ndarrays()]
        content = {"arrays": ArrayRecord(values), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    initial = [v.numpy() for v in initial_state().values()]
    app = server_app(normalization(FedAvg(fraction_evaluate=0.0), Net, "fedbn"), 1, arrays=ArrayRecord(initial))
    grid = simulate(app, client, 2)
    final = app.result.arrays.to_numpy_ndarrays()
    changed = [name for name, a, b in zip(initial_state(), initial, final, strict=True) if not np.array_equal(a, b)]
    assert changed == ["first.weight", "last.weight", "last.bias"]
    assert isinstance(grid.partition_context(0), Context)
    assert isinstance(next(iter(app.result.arrays.values())), Array)
