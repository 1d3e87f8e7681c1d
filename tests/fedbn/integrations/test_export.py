"""Exported files give the outputs of the model; failed exports leave no file."""

from __future__ import annotations

import json
import logging
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedbn import personalize
from fedbn.errors import UserError
from fedbn.integrations import export as module
from fedbn.integrations.export import export, fold_batch_norm
from fedbn.integrations.pretrained import load_pretrained
from fedbn.models import build
from fedbn_simulations.experiments.compare import compare
from fedbn_simulations.experiments.experiment import Experiment


@pytest.fixture(scope="module")
def personal():
    """A user's exported network with adapted statistics, inputs, and expected outputs."""
    net = personalize(build("har-cnn", (3, 32), 4, seed=0), "pseudo:n0=4")
    torch.manual_seed(0)
    x = torch.randn(12, 3, 32) * 2 + 1
    for row in x:
        net(row[None], user="ann")
    return net.export("ann"), x, net.predict(x, user="ann")


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", pytest.param(".pt2", marks=pytest.mark.slow)])
def test_export_matches_model(personal, tmp_path, suffix, fold):
    model, x, expected = personal
    path = tmp_path / "new" / f"model{suffix}"
    assert export(fold_batch_norm(model) if fold else model, x, path) < 1e-5
    if suffix == ".pt2":
        torch.testing.assert_close(torch.export.load(path).module()(x[:5]), expected[:5], atol=1e-5, rtol=1e-4)
    elif not fold:
        assert load_file(path).keys() == model.state_dict().keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_export_onnx_runs_in_onnxruntime(personal, tmp_path, caplog):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x, expected = personal
    assert export(fold_batch_norm(model), x, tmp_path / "model.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for rows in (1, 12):
        (actual,) = session.run(None, {"x": x[:rows].numpy()})
        np.testing.assert_allclose(actual, expected[:rows].numpy(), atol=1e-5, rtol=1e-4)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_fold_batch_norm_folds_all_layers_of_a_copy(personal):
    model, x, expected = personal
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = fold_batch_norm(model)
    assert not [m for m in plain.modules() if isinstance(m, _BatchNorm)]
    assert [m for m in model.modules() if isinstance(m, _BatchNorm)]
    torch.testing.assert_close(plain(x), expected, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Branches(nn.Module):
    """Branches on values, so that it cannot be traced."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


def test_export_rejects_untraceable_model(tmp_path):
    with pytest.raises(UserError, match="Branches cannot be traced.*export without folding"):
        fold_batch_norm(Branches())
    with pytest.raises(UserError, match=r"Branches cannot be exported as \.pt2"):
        export(Branches(), torch.ones(2, 2), tmp_path / "m.pt2")


def test_export_rejects_unknown_suffix_and_missing_package(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"unknown suffix of an export '\.onx'\. Did you mean '\.onnx'"):
        export(nn.Linear(2, 2), torch.ones(2, 2), tmp_path / "m.onx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'fedbn\[onnx\]'"):
        export(nn.Linear(2, 2), torch.ones(2, 2), tmp_path / "m.onnx")


def test_export_removes_file_with_different_outputs(tmp_path, monkeypatch):
    def wrong(model, example, path):
        path.write_bytes(b"")
        return lambda x: model(x) + 0.01

    monkeypatch.setitem(module.WRITERS, ".pt2", wrong)
    with pytest.raises(UserError, match=r"would differ from the model by 0\.01"):
        export(nn.Linear(2, 2), torch.ones(2, 2), tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "results"
    values = {"scenario": "digits8", "strategies": ("global-naive", "fedbn+ditto"), "seeds": 1}
    values["plan"] = {"rounds": 1, "eval_every": 1, "global_test": 20}
    return compare(Experiment.from_dict(values).resolved(), directory, workers=1)


def result_of(directory, strategy):
    name = strategy.replace("+", "-")
    (path,) = (p for p in directory.glob("runs/*/result.json") if p.parent.name.startswith(name))
    return path


def user_and_accuracy(directory, strategy, row):
    lines = json.loads(result_of(directory, strategy).read_text())["evaluations"]
    line = next(e for e in lines if (e["row"], e["column"]) == (row, "aggregated"))
    return line["user"], line["accuracy"]


@pytest.mark.parametrize(
    ("strategy", "row"), [("fedbn+ditto", "own"), ("fedbn+ditto", "unseen"), ("global-naive", "own")]
)
def test_cli_export_writes_evaluated_model(directory, run_cli, tmp_path, strategy, row):
    from fedbn.federation.run import Run
    from fedbn.federation.setup import build_context

    user, accuracy = user_and_accuracy(directory, strategy, row)
    path = tmp_path / "model.safetensors"
    code, out, err = run_cli("export", directory, "--strategy", strategy, "--user", user, "--out", path, "--json")
    assert code == 0, err
    assert json.loads(out)["input"] == [1, 8, 8]
    ctx = build_context(Run.from_dict(json.loads(result_of(directory, strategy).read_text())["run"]))
    test = next(u for u in ctx.population.users if u.name == user).test
    model = ctx.load(load_file(path)).eval()
    assert float((model(test.x).argmax(1) == test.y).double().mean()) == accuracy


def test_cli_export_applies_rule_to_statistics(directory, run_cli, tmp_path):
    user, _ = user_and_accuracy(directory, "global-naive", "own")
    common = ["export", directory, "--strategy", "global-naive", "--user", user, "--out"]
    assert run_cli(*common, tmp_path / "a.safetensors")[0] == 0
    assert run_cli(*common, tmp_path / "b.safetensors", "--rule", "pseudo:n0=4")[0] == 0
    a, b = (load_file(tmp_path / f"{n}.safetensors") for n in "ab")
    changed = {k for k in a if not torch.equal(a[k], b[k])}
    assert changed
    assert all("running" in k for k in changed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "fedbm"], "Known: fedbn+ditto, global-naive"),
        (["--strategy", "global-naive", "--seed", "4"], "unknown seed"),
        (["--strategy", "global-naive", "--user", "nobody"], "unknown user 'nobody'"),
        (["--strategy", "global-naive", "--rule", "pseudo"], "name the user with --user"),
    ],
)
def test_cli_export_rejects_bad_input(directory, run_cli, tmp_path, arguments, message):
    code, _, err = run_cli("export", directory, *arguments, "--out", tmp_path / "m.safetensors")
    assert code == 2
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("normalize", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_export_of_weight_hooks_loads_into_the_users_network(normalize, tmp_path, register_model):
    def make(classes=3):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, classes))
        normalize(net[0])
        normalize(net[3])
        return net

    net = build(register_model(make), (2, 8), 3, seed=0)
    x = torch.randn(6, 2, 8)
    optimizer = torch.optim.SGD(net.train().parameters(), 0.1)
    net(x).square().mean().backward()
    optimizer.step()
    expected = net.eval()(x).detach()
    assert export(net, x, tmp_path / "net.safetensors") < 1e-6
    torch.testing.assert_close(fold_batch_norm(net)(x), expected, atol=1e-5, rtol=1e-4)
    plain = make()
    plain.load_state_dict(load_file(tmp_path / "net.safetensors"))
    torch.testing.assert_close(plain.eval()(x), expected)
    again = build(register_model(make), (2, 8), 3, seed=1)
    assert load_pretrained(again, tmp_path / "net.safetensors") == []
    torch.testing.assert_close(again.eval()(x), expected)
