from __future__ import annotations

import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, arrays_size_mod, fixedclipping_mod, message_size_mod
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedTrimmedAvg, FedYogi, Krum
from torch import nn

from fedbn.errors import UserError
from fedbn.nn.roles import clone
from fedbn.strategies.base import strategies
from fedbn.strategies.fedbn import FedBN
from fedbn_clients import entries as entries_module
from fedbn_clients.mods import NORMALIZATION_STATE, normalization
from fedbn_clients.persistence import STATE_DIR_VARIABLE
from fedbn_clients.training_mode import warn_once
from tests.flower_apps import (
    Module,
    Net,
    data,
    initial_state,
    local_error,
    local_training,
    message_app,
    node_context,
    numpy_client_app,
    send,
    server_app,
    simulate,
    sklearn_app,
    train_content,
    trainer_app,
)
from tests.helpers import same

FROM_OUTSIDE = {
    *("divergence-pooled", "fedbn", "fedbn-seeded", "global-naive", "global-pooled", "global-recalibrated"),
    *("global-robust", "local", "mtfl", "params-only", "silobn", "static-bn"),
}
LOCAL = [name for name in initial_state() if name.startswith("scaler")]


def clip_content(norm=0.5):
    return train_content(**{"clipping_norm": norm})


def state_of(record):
    return dict(record.to_torch_state_dict())


def own(context):
    """The client's entries in its context."""
    return state_of(context.state[NORMALIZATION_STATE])


def last_errors(app, client, rounds=3):
    """Error of each client under the final arrays of a simulation."""
    grid = simulate(app, client)
    content = RecordDict({"arrays": app.result.arrays})
    replies = [send(client, "evaluate", content, grid.partition_context(i)) for i in range(3)]
    return [reply.content["metrics"]["error"] for reply in replies]


def fedbn_by_hand(rounds, net=Net, local=lambda name: "scaler" in name):
    """Errors of FedBN in a loop without Flower."""
    server = clone(initial_state(net))
    own = [{k: v for k, v in server.items() if local(k)} for _ in range(3)]
    models = [net() for _ in range(3)]
    for _ in range(rounds):
        for i, model in enumerate(models):
            model.load_state_dict({**server, **own[i]})
            local_training(model, *data(i))
            own[i] = {k: v for k, v in clone(model.state_dict()).items() if local(k)}
        mean = {k: torch.stack([m.state_dict()[k].double() for m in models]).mean(0).float() for k in server}
        server = {k: v if local(k) else mean[k] for k, v in server.items()}
    for i, model in enumerate(models):
        model.load_state_dict({**server, **own[i]})
    return [local_error(model, *data(i)) for i, model in enumerate(models)]


# ---------------------------------------------------------------- apps


def test_normalization_equals_fedbn_by_hand():
    app = server_app(FedAvg(), rounds=3)
    errors = last_errors(app, message_app([normalization(Net, "fedbn")]))
    assert errors == pytest.approx(fedbn_by_hand(3), rel=1e-5)


@pytest.mark.slow
def test_normalization_improves_app_under_feature_shift():
    app = server_app(FedAvg(), rounds=10)
    plain = last_errors(app, message_app())
    app = server_app(FedAvg(), rounds=10)
    personal = last_errors(app, message_app([normalization(Net, "fedbn")]))
    assert np.mean(personal) < 0.25 * np.mean(plain)


def legacy_server(rounds=3):
    arrays = [value.numpy() for value in initial_state().values()]

    def server_fn(context):
        from flwr.common import ndarrays_to_parameters

        strategy = LegacyFedAvg(min_available_clients=3, initial_parameters=ndarrays_to_parameters(arrays))
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))

    return ServerApp(server_fn=server_fn)


def test_normalization_works_by_position_with_numpy_client():
    client = numpy_client_app([normalization(Net, "fedbn")])
    grid = simulate(legacy_server(), client)
    by_name = simulate(server_app(FedAvg(), rounds=3), message_app([normalization(Net, "fedbn")]))
    for i in range(3):
        a, b = own(grid.partition_context(i)), own(by_name.partition_context(i))
        assert list(a) == list(b) == LOCAL
        for name in LOCAL:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_normalization_works_with_trainer_app_and_prefixed_names():
    app = server_app(FedAvg(), rounds=10, arrays=ArrayRecord(initial_state(Module)))
    plain = last_errors(app, trainer_app())
    app = server_app(FedAvg(), rounds=10, arrays=ArrayRecord(initial_state(Module)))
    personal = last_errors(app, trainer_app([normalization(Module, "fedbn")]))
    assert np.mean(personal) < 0.5 * np.mean(plain)


def test_scikit_learn_app_passes_through_unchanged():
    initial = ArrayRecord([np.zeros(4), np.zeros(1)])
    results = []
    for mods in ([], [normalization(lambda: nn.Linear(4, 1, dtype=torch.float64), "fedavg")]):
        app = server_app(FedAvg(), rounds=2, arrays=initial)
        simulate(app, sklearn_app(mods))
        results.append([a.data for a in app.result.arrays.values()])
    assert results[0] == results[1]


# ---------------------------------------------------------------- messages


def test_train_reply_has_received_keys_order_types_and_local_values():
    app, context = message_app([normalization(Net, "fedbn")]), node_context(1)
    received = ArrayRecord(OrderedDict(reversed(initial_state().items())))
    received["scaler.num_batches_tracked"] = Array(np.asarray(3.5))  # as FedAvg leaves it
    reply = send(app, "train", train_content(received), context).content["arrays"]
    assert list(reply) == list(received)
    for name in LOCAL:
        assert reply[name].data == received[name].data
    assert reply["first.weight"].data != received["first.weight"].data
    tracked = own(context)["scaler.num_batches_tracked"]
    assert tracked.dtype == torch.int64
    assert int(tracked) == 3 + 6  # two epochs of three batches


def test_outer_mods_see_the_received_message():
    seen = []

    def outer(message, context, call_next):
        reply = call_next(message, context)
        seen.append(state_of(message.content["arrays"]))
        return reply

    app, context = message_app(train_mods=[outer, normalization(Net, "fedbn")]), node_context(1)
    for _ in range(2):
        send(app, "train", train_content(), context)
    assert all(same(state, initial_state()) for state in seen)
    assert len(seen) == 2


def test_evaluation_and_queries_use_own_entries_and_store_nothing():
    app, context = message_app([normalization(Net, "fedbn")]), node_context(2)
    send(app, "train", train_content(), context)
    before = own(context)
    model = Net()
    model.load_state_dict({**initial_state(), **before})
    reply = send(app, "evaluate", train_content(), context)
    assert reply.content["metrics"]["error"] == local_error(model, *data(2))
    content = train_content()
    content["arrays"] = ArrayRecord(initial_state())
    assert same(own(context), before)


def test_query_that_returns_the_model_sends_nothing_local():
    app = message_app([normalization(Net, "fedbn")])

    @app.query("model")
    def model(message, context):
        predictions = ArrayRecord([np.ones(2)])
        part = ArrayRecord({"scaler.running_mean": message.content["arrays"]["scaler.running_mean"]})
        content = {"model": message.content["arrays"], "predictions": predictions, "part": part}
        return Message(RecordDict(content), reply_to=message)

    context = node_context(1)
    send(app, "train", train_content(), context)
    reply = send(app, "query.model", RecordDict({"arrays": ArrayRecord(initial_state())}), context)
    assert same(state_of(reply.content["model"]), initial_state())
    assert torch.equal(state_of(reply.content["part"])["scaler.running_mean"], initial_state()["scaler.running_mean"])
    assert reply.content["predictions"]["0"].numpy().tolist() == [1, 1]


def test_messages_without_model_reach_the_app():
    app = message_app([normalization(Net, "fedbn")])

    @app.query("info")
    def info(message, context):
        return Message(RecordDict({"keys": ConfigRecord({"names": list(message.content)})}), reply_to=message)

    for content in (RecordDict(), RecordDict({"other": ArrayRecord({"x": Array(np.ones(1))})})):
        reply = send(app, "query.info", content, node_context())
        assert reply.content["keys"]["names"] == list(content)


def test_train_reply_may_have_other_records():
    """Such as the control variates of an app that implements SCAFFOLD; they can have any names."""
    app, context = ClientApp(mods=[normalization(Net, "fedbn")]), node_context()

    @app.train()
    def train(message, context):
        model = ArrayRecord({k: v + 1 for k, v in message.content["arrays"].to_torch_state_dict().items()})
        control = ArrayRecord({"control": Array(np.ones(2)), "scaler.weight": model["scaler.weight"]})
        return Message(RecordDict({"controls": control, "arrays": model}), reply_to=message)

    reply = send(app, "train", train_content(), context).content
    assert own(context)["scaler.weight"].tolist() == [2.0] * 6
    assert state_of(reply["arrays"])["scaler.weight"].tolist() == [1.0] * 6
    assert state_of(reply["controls"])["scaler.weight"].tolist() == [1.0] * 6
    assert state_of(reply["controls"])["control"].tolist() == [1.0, 1.0]


def test_train_reply_without_arrays_leaves_state():
    app, context = ClientApp(mods=[normalization(Net, "fedbn")]), node_context()

    @app.train()
    def train(message, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    reply = send(app, "train", train_content(), context)
    assert list(reply.content) == ["metrics"]
    assert NORMALIZATION_STATE not in context.state


@pytest.mark.parametrize("raises", [True, False])
def test_state_is_restored_after_error(raises):
    app, context = message_app([normalization(Net, "fedbn")]), node_context()
    send(app, "train", train_content(), context)
    before = own(context)
    broken = ClientApp(mods=[normalization(Net, "fedbn")])

    @broken.train()
    def train(message, context):
        if raises:
            raise RuntimeError("no memory")
        return Message(Error(1, "no memory"), reply_to=message)

    if raises:
        with pytest.raises(RuntimeError, match="no memory"):
            send(broken, "train", train_content(), context)
    else:
        assert send(broken, "train", train_content(), context).has_error()
    assert same(own(context), before)


def test_app_sees_only_its_own_state_and_may_replace_it():
    app, seen = ClientApp(mods=[normalization(Net, "fedbn")]), []

    @app.train()
    def train(message, context):
        seen.append(list(context.state))
        context.state = RecordDict({"mine": ConfigRecord({"calls": len(seen)})})
        content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    context = node_context()
    for _ in range(2):
        send(app, "train", train_content(), context)
    assert seen == [[], ["mine"]]
    assert set(context.state) == {"mine", NORMALIZATION_STATE}


def test_model_is_built_without_drawing_random_numbers():
    entries_module._entries.cache_clear()
    app = ClientApp(mods=[normalization(Net, "fedbn")])

    @app.train()
    def train(message, context):
        content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"x": float(torch.rand(()))})}
        return Message(RecordDict(content), reply_to=message)

    content = train_content()
    torch.manual_seed(3)
    expected = float(torch.rand(()))
    torch.manual_seed(3)
    assert send(app, "train", content, node_context()).content["metrics"]["x"] == expected


def test_mod_can_be_pickled():
    mod = normalization(Net, "fedbn")
    context, again = node_context(), node_context()
    a = send(message_app([mod]), "train", train_content(), context)
    b = send(message_app([pickle.loads(pickle.dumps(mod))]), "train", train_content(), again)  # noqa: S301
    assert same(state_of(a.content["arrays"]), state_of(b.content["arrays"]))
    assert same(own(context), own(again))


# ---------------------------------------------------------------- other mods and strategies


@pytest.mark.parametrize("mod", [fixedclipping_mod, LocalDpMod(0.5, 1e-9, 1.0, 0.5), message_size_mod, arrays_size_mod])
def test_normalization_inside_other_mods_stores_unclipped_entries(mod):
    plain, context = node_context(1), node_context(1)
    send(message_app([normalization(Net, "fedbn")]), "train", clip_content(), plain)
    app = message_app(train_mods=[mod, normalization(Net, "fedbn")])
    content = clip_content()
    reply = send(app, "train", content, context)
    assert same(own(context), own(plain))
    assert list(reply.content["arrays"]) == list(content["arrays"])


@pytest.mark.parametrize("mod", [fixedclipping_mod, LocalDpMod(0.5, 1e-9, 1.0, 0.5), message_size_mod, arrays_size_mod])
def test_normalization_outside_other_mods_keeps_the_messages_valid(mod):
    context, content = node_context(1), clip_content()
    app = message_app(train_mods=[normalization(Net, "fedbn"), mod])
    reply = send(app, "train", content, context)
    assert all(reply.content["arrays"][name].data == content["arrays"][name].data for name in LOCAL)
    plain = node_context(1)
    send(message_app([normalization(Net, "fedbn")]), "train", clip_content(), plain)
    clips = mod is fixedclipping_mod or isinstance(mod, LocalDpMod)
    assert list(own(context)) == LOCAL
    assert same(own(context), own(plain)) != clips, "a clipping mod inside also clips the client's own entries"


@pytest.mark.parametrize("mod", [fixedclipping_mod, LocalDpMod(0.5, 1e-9, 1.0, 0.5)])
def test_clipping_mods_of_the_whole_app_break_evaluation_without_normalization_too(mod):
    assert send(message_app([mod]), "evaluate", clip_content(), node_context()).has_error()
    assert not send(message_app(train_mods=[mod]), "evaluate", clip_content(), node_context()).has_error()


@pytest.mark.parametrize("strategy", [FedAdam, FedYogi, FedAvgM, FedMedian, FedTrimmedAvg, Krum])
def test_local_entries_of_server_stay_initial_with_any_flower_strategy(strategy):
    options = {"server_momentum": 0.5} if strategy is FedAvgM else {}
    app = server_app(strategy(min_available_nodes=3, **options), rounds=2)
    grid = simulate(app, message_app([normalization(Net, "fedbn")]))
    final = app.result.arrays
    for name, value in initial_state().items():
        if name in LOCAL:
            torch.testing.assert_close(torch.from_numpy(final[name].numpy()).float(), value.float())
    assert int(own(grid.partition_context(0))["scaler.num_batches_tracked"]) == 12


def test_secure_aggregation_inside_normalization_is_refused():
    app = message_app([normalization(Net, "fedbn")])
    content = train_content()
    content[RECORD_KEY_CONFIGS] = ConfigRecord({Key.STAGE: "setup"})
    with pytest.raises(UserError, match=r"mods=\[secaggplus_mod, normalization\]"):
        send(app, "train", content, node_context())
    content[RECORD_KEY_CONFIGS] = ConfigRecord({})  # the mod of SecAgg+ is outside and has removed the stage
    assert not send(app, "train", content, node_context()).has_error()


def test_evaluation_in_training_mode_is_reported_once(caplog):
    app = ClientApp(mods=[normalization(Net, "fedbn")])

    @app.evaluate()
    def evaluate(message, context):
        net = Net()
        if context.node_config["partition-id"]:
            net.eval()
        net(torch.randn(4, 4))
        return Message(RecordDict(), reply_to=message)

    warn_once.cache_clear()
    send(app, "evaluate", train_content(), node_context(1))
    assert not caplog.records
    for _ in range(2):
        send(app, "evaluate", train_content(), node_context(0))
    (record,) = caplog.records
    assert "call model.eval()" in record.message


def test_entries_are_restored_from_disk(tmp_path, monkeypatch):
    app, context = message_app([normalization(Net, "fedbn")]), node_context(1, **{"state-dir": str(tmp_path)})
    send(app, "train", train_content(), context)
    restarted = node_context(1, **{"state-dir": str(tmp_path)})
    a = send(app, "evaluate", train_content(), context).content["metrics"]["error"]
    assert send(app, "evaluate", train_content(), restarted).content["metrics"]["error"] == a
    assert same(own(restarted), own(context))
    monkeypatch.setenv(STATE_DIR_VARIABLE, str(tmp_path))
    other_run = Context(2, 1001, {"partition-id": 1}, RecordDict(), {})
    assert send(app, "evaluate", train_content(), other_run).content["metrics"]["error"] != a
    assert NORMALIZATION_STATE not in other_run.state


def test_seeded_entries_are_sent_and_stored():
    app, context = message_app([normalization(Net, "fedbn-seeded")]), node_context(1)
    reply = send(app, "train", train_content(), context).content["arrays"]
    mean = "scaler.running_mean"
    assert torch.equal(state_of(reply)[mean], own(context)[mean])
    assert not torch.equal(own(context)[mean], initial_state()[mean])
    assert int(state_of(reply)["scaler.num_batches_tracked"]) == 0
    evaluated = send(app, "evaluate", train_content(), context).content["metrics"]["error"]
    model = Net()
    model.load_state_dict({**initial_state(), **own(context)})
    assert evaluated == local_error(model, *data(1))


def test_silobn_keeps_statistics_and_sends_affine_parameters():
    app, context = message_app([normalization(Net, "silobn")]), node_context(1)
    reply = send(app, "train", train_content(), context).content["arrays"]
    assert list(own(context)) == ["scaler.running_mean", "scaler.running_var", "scaler.num_batches_tracked"]
    assert not torch.equal(state_of(reply)["scaler.weight"], initial_state()["scaler.weight"])


def test_parameters_alone_are_matched_by_position():
    names = [name for name, _ in Net().named_parameters()]
    app = ClientApp(mods=[normalization(Net, "fedbn")])

    @app.train()
    def train(message, context):
        values = [a + 1 for a in message.content["arrays"].to_numpy_ndarrays()]
        content = {"arrays": ArrayRecord(values), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    received = ArrayRecord([initial_state()[name].numpy() for name in names])
    context = node_context()
    reply = send(app, "train", train_content(received), context).content["arrays"]
    unchanged = [names[i] for i, key in enumerate(received) if reply[key].data == received[key].data]
    assert unchanged == list(own(context)) == ["scaler.weight", "scaler.bias"]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("name", strategies())
def test_strategies_that_need_more_than_arrays_are_refused_by_name(name):
    def start():
        app = message_app([normalization(Net, name, calibration=lambda context: data(0)[0])])
        return send(app, "train", train_content(), node_context())

    if name in FROM_OUTSIDE:
        assert start().has_content()
    else:
        with pytest.raises(
            UserError, match=f"strategy '{name}' .*cannot be (applied|done) from outside|a convolutional"
        ):
            start()


def test_arrays_outside_of_normalization_layers_are_matched_by_position():
    """As those of an app that applies FedBN by itself, such as Flower's baseline."""
    table = entries_module.entries(Net, FedBN())
    names = [name for name in initial_state() if not name.startswith("scaler")]
    values = [Array(initial_state()[name].numpy()) for name in names]
    assert list(table.names(ArrayRecord(dict(zip("012", values, strict=True)))).values()) == names
    with pytest.raises(UserError, match=r"position of first.weight has shape \[1, 6\], not \[6, 4\]"):
        table.names(ArrayRecord({"0": values[1], "1": values[0], "2": values[2]}))


def test_errors_name_mistake_and_fix():
    with pytest.raises(UserError, match="Did you mean 'fedbn'"):
        normalization(Net, "fedbm")
    with pytest.raises(UserError, match="calibration=lambda context: batches"):
        normalization(Net, "global-recalibrated")
    context = node_context()
    app = message_app([normalization(Net, "fedbn")])
    with pytest.raises(UserError, match=r"does not have \(weight, bias\): pass the app's own model_fn"):
        send(app, "train", train_content(nn.Linear(2, 2).state_dict()), context)
    with pytest.raises(UserError, match=r"4 arrays without names, but the model has 8 entries and 5 parameters"):
        send(app, "train", train_content(ArrayRecord([np.ones(2)] * 4)), context)
    with pytest.raises(UserError, match=r"position of scaler.weight has shape \[2\], not \[6\]"):
        send(app, "train", train_content(ArrayRecord([np.ones(2)] * 8)), context)
    two_records = RecordDict({name: ArrayRecord(initial_state()) for name in "ab"})
    with pytest.raises(UserError, match=r"2 records of arrays \(a, b\): call the one with the model 'arrays'"):
        send(app, "train", two_records, context)
    with pytest.raises(UserError, match="must return a torch.nn.Module, not dict"):
        send(message_app([normalization(dict, "fedbn")]), "train", train_content(), context)
    with pytest.raises(UserError, match="no layer"):
        send(message_app([normalization(lambda: nn.Linear(2, 2), "fedbn")]), "train", train_content(), context)


def test_reply_with_other_arrays_is_refused():
    app = ClientApp(mods=[normalization(Net, "fedbn")])

    @app.train()
    def train(message, context):
        state = {k: v for k, v in initial_state().items() if "scaler" not in k}
        return Message(RecordDict({"arrays": ArrayRecord(state)}), reply_to=message)

    with pytest.raises(UserError, match=r"differ in scaler.bias, scaler.num_batches_tracked, .*return all arrays"):
        send(app, "train", train_content(), node_context())
