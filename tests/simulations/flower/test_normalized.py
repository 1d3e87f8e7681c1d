"""Strategies around an app that does not know them: mods, wrapped strategies, models with other layers."""

from __future__ import annotations

import shutil

import pytest
import torch
from flwr.serverapp.strategy import Strategy

from fedbn.errors import UserError
from fedbn.nn.conversion import kinds
from fedbn_simulations.engines.simulation import run_simulation
from fedbn_simulations.flower.apps import FlowerApp
from fedbn_simulations.flower.compat import copy_records, with_content
from fedbn_simulations.flower.normalized import normalized
from tests.helpers import ROOT

APPS = ROOT / "tests" / "apps"


def run(name, strategy, tmp_path, model=None, *overrides):
    """Run an app under a strategy. Returns its final state, and the replies of its clients by kind of message."""
    app = FlowerApp.read(APPS / name)
    replies = {}

    def record(message, reply):
        assert not reply.has_error(), reply.error.reason
        # Flower's former servers empty the records that they receive.
        pair = [with_content(m, copy_records(m.content)) for m in (message, reply)]
        replies.setdefault(message.metadata.message_type, []).append(pair)

    config = app.run_config([f"out='{tmp_path / 'final.pt'}'", *overrides] if name == "messages" else [])
    with normalized(app, model, strategy) as found:
        run_simulation(found.server, found.client, 4, run_config=config, seed=0, on_reply=record)
    final = torch.load(tmp_path / "final.pt") if name == "messages" else None
    return final, replies


def mean_error(replies):
    """Mean error in the last evaluation of the four clients."""
    found = [reply.content["metrics"]["eval_mse"] for _, reply in replies["evaluate"][-4:]]
    return sum(found) / len(found)


def test_fedbn_from_outside_reduces_the_error_of_the_app(tmp_path):
    rounds = "num-server-rounds=4"
    plain, fedbn = (mean_error(run("messages", s, tmp_path, None, rounds)[1]) for s in ("fedavg", "fedbn"))
    assert fedbn < plain / 4
    assert Strategy.start.__module__ == "flwr.serverapp.strategy.strategy"


def test_global_naive_is_the_unchanged_app(tmp_path):
    naive, _ = run("messages", "global-naive", tmp_path)
    app = FlowerApp.read(APPS / "messages")
    with app.loaded() as (server, client):
        run_simulation(server, client, 4, run_config=app.run_config([f"out='{tmp_path / 'b.pt'}'"]), seed=0)
    assert all(torch.equal(value, torch.load(tmp_path / "b.pt")[name]) for name, value in naive.items())


def test_wrapper_keeps_counters_and_pools_variances(tmp_path):
    naive, replies = run("messages", "global-naive", tmp_path, None, "num-server-rounds=1")
    pooled, _ = run("messages", "global-pooled", tmp_path, None, "num-server-rounds=1")
    states = [reply.content["arrays"].to_torch_state_dict() for _, reply in replies["train"]]
    means = torch.stack([s["norm.running_mean"] for s in states])
    variances = torch.stack([s["norm.running_var"] for s in states])
    torch.testing.assert_close(naive["norm.running_var"], variances.mean(0))
    torch.testing.assert_close(pooled["norm.running_var"], variances.mean(0) + means.var(0, unbiased=False))
    assert naive["norm.num_batches_tracked"].dtype == torch.float64
    assert pooled["norm.num_batches_tracked"] == torch.tensor(0)


@pytest.mark.parametrize("model", [None, "messages.task:Net"])
def test_groupnorm_replaces_layers_where_the_app_builds_its_model(model, tmp_path):
    final, replies = run("messages", "groupnorm:groups=4", tmp_path, model)
    assert list(final) == ["conv.weight", "norm.weight", "norm.bias", "fc.weight", "fc.bias"]
    assert mean_error(replies) > 0


def test_groupnorm_replaces_layers_of_a_class_that_names_itself(tmp_path):
    """Flower's quickstart calls super(Net, self), and other classes of the app may inherit from it."""
    app = copy_app(tmp_path, task=("super().__init__()", "super(Net, self).__init__()"))
    path = app.directory / "messages" / "task.py"
    path.write_text(path.read_text() + "\n\nclass Deep(Net):\n    pass\n")
    with app.loaded():
        with normalized(app, "messages.task:Deep", "groupnorm"):
            assert "GroupNorm" in repr(app.load("messages.task:Deep")())
            assert "BatchNorm1d" in repr(app.load("messages.task:Net")())
        with normalized(app, None, "groupnorm"):
            assert "GroupNorm" in repr(app.load("messages.task:Net")())
            assert "BatchNorm1d" in repr(app.load("messages.task:Deep")())
        assert "BatchNorm1d" in repr(app.load("messages.task:Net")())


def test_groupnorm_replaces_layers_of_a_model_function(tmp_path):
    _, replies = run("numpy_client", "groupnorm", tmp_path, "numpyclient.task:make_net")
    assert {len(reply.content.array_records) for _, reply in replies["train"]} == {1}
    assert {len(r) for _, reply in replies["train"] for r in reply.content.array_records.values()} == {6}


def test_app_is_as_before_after_groupnorm():
    app = FlowerApp.read(APPS / "messages")
    with app.loaded():
        with normalized(app, None, "groupnorm"):
            assert "GroupNorm" in repr(app.load("messages.client_app:Net")())
        assert "BatchNorm1d" in repr(app.load("messages.client_app:Net")())


def test_groupnorm_applies_to_an_app_whose_package_hides_this_project(tmp_path):
    """As Flower's own baseline, whose package is called fedbn."""
    shutil.copytree(APPS / "messages", tmp_path, dirs_exist_ok=True)
    (tmp_path / "messages").rename(tmp_path / "fedbn")
    for file in [*(tmp_path / "fedbn").glob("*.py"), tmp_path / "pyproject.toml"]:
        file.write_text(file.read_text().replace("messages.", "fedbn."))
    kinds.cache_clear()
    app = FlowerApp.read(tmp_path)
    with normalized(app, None, "groupnorm"):
        assert "GroupNorm" in repr(app.load("fedbn.client_app:Net")())


def test_mod_applies_to_numpy_clients(tmp_path):
    _, replies = run("numpy_client", "silobn", tmp_path, "numpyclient.task:make_net")
    for message, reply in replies["train"]:
        (sent,), (received) = message.content.array_records.values(), next(iter(reply.content.array_records.values()))
        keys = list(sent)
        assert sent[keys[4]].data == received[keys[4]].data  # the running mean
        assert sent[keys[0]].data != received[keys[0]].data


def copy_app(tmp_path, **replacements):
    """A copy of the app with messages, with texts replaced in its files."""
    app = tmp_path / "app"
    shutil.copytree(APPS / "messages", app)
    for file, (old, new) in replacements.items():
        path = app / ("pyproject.toml" if file == "pyproject" else f"messages/{file}.py")
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    return FlowerApp.read(app)


def enter(app, strategy, model=None):
    with normalized(app, model, strategy) as found:
        return found


@pytest.mark.parametrize(
    ("strategy", "replacements", "model", "text"),
    [
        ("fedbn", {"pyproject": ("[tool.fedbn]", "[tool.other]")}, None, "give --model-fn package.module:Net, or add"),
        ("fedbn", {}, "messages.task", "given as package.module:Net, not 'messages.task'"),
        ("fedbn", {}, "messages.task:Nett", "module messages.task of .* has no 'Nett'"),
        ("fedbn", {}, "messages.tusk:Net", "has no module messages.tusk, which messages.tusk:Net names"),
        ("fedbn", {}, "messages.task:torch", "messages.task:torch is a module, not a function or class"),
        ("fedbn", {}, "messages.task:load_data", "messages.task:load_data needs arguments .*: name a function without"),
        ("fedbn", {}, "messages.client_app:MetricRecord", "must return a torch.nn.Module, not MetricRecord"),
        ("fedbn", {"task": ("nn.BatchNorm1d(8)", "nn.Identity()")}, None, "has no normalization layers"),
        ("fixbn", {}, None, "strategy 'fixbn' needs control over local training"),
        ("global-recalibrated", {}, None, "measures statistics on data of the clients.*or choose global-pooled"),
        ("centralized", {}, None, "strategy 'centralized' .*outside an app"),
        ("dbn", {}, None, "strategy 'dbn'"),
        ("fedbm", {}, None, "unknown strategy 'fedbm'. Did you mean 'fedbn'"),
    ],
)
def test_normalized_refuses_what_cannot_be_done(strategy, replacements, model, text, tmp_path):
    with pytest.raises(UserError, match=text):
        enter(copy_app(tmp_path, **replacements), strategy, model)


def test_groupnorm_is_refused_if_the_app_builds_its_model_in_another_way(tmp_path):
    app = copy_app(tmp_path, task=("class Net(nn.Module):", "class Other(nn.Module):"))
    path = app.directory / "messages" / "task.py"
    path.write_text(path.read_text() + "\n\nclass Net(Other):\n    pass\n")
    for name in ("client_app", "server_app"):
        file = app.directory / "messages" / f"{name}.py"
        file.write_text(file.read_text().replace("Net()", "Other()").replace("import Net", "import Other"))
    errors = []
    with normalized(app, None, "groupnorm") as found:
        config = app.run_config(["num-server-rounds=1"])
        run_simulation(
            found.server, found.client, 2, run_config=config, on_reply=lambda m, r: errors.append(r.error.reason)
        )
    assert "groupnorm' replaces layers of messages.task:Net, but the app builds its model in another way" in errors[0]


def test_pooling_is_refused_for_servers_without_a_strategy_that_can_be_wrapped(tmp_path):
    with pytest.raises(UserError, match="this app has a server_fn: choose fedbn, silobn or mtfl"):
        enter(FlowerApp.read(APPS / "numpy_client"), "global-pooled", "numpyclient.task:make_net")
    app = copy_app(tmp_path, server_app=("    result = ", "    return\n    result = "))
    with (
        pytest.raises(UserError, match="server has no start\\(\\) of flwr.serverapp.strategy"),
        normalized(app, None, "global-pooled") as found,
    ):
        run_simulation(found.server, found.client, 2, run_config=app.run_config())


def test_strategies_with_their_own_start_are_wrapped(tmp_path):
    own = "    def start(self, *args, **kwargs):\n        return super().start(*args, **kwargs)\n\n"
    app = copy_app(tmp_path, server_app=("    def aggregate_train", own + "    def aggregate_train"))
    out = tmp_path / "out.pt"
    with normalized(app, None, "global-pooled") as found:
        config = app.run_config([f"out='{out}' in-order=true"])
        run_simulation(found.server, found.client, 2, run_config=config)
    assert torch.load(out)["norm.num_batches_tracked"].dtype == torch.int64
