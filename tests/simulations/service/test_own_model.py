"""Serving a user's own model and validating its inputs before the service starts."""

from __future__ import annotations

import inspect
import json
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

pytest.importorskip("fastapi")

from fedbn.errors import UserError
from fedbn.online import SQLiteStore
from fedbn.online.rules.base import rules
from fedbn_simulations.cli.app import app as cli
from fedbn_simulations.cli.service import serve
from fedbn_simulations.service.access import Access
from fedbn_simulations.service.model import ServedModel
from tests.helpers import PYTHONPATH

MODULE = """
from torch import nn

def net(shape, classes):
    return nn.Sequential(
        nn.Conv1d(shape[0], 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(4, classes),
    )

def plain(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(32, classes))

def short(classes):
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten())
"""
CLASSES = ("sit", "walk", "lie")
SERVE_OWN = ("serve", "--model", "own_nets:net", "--weights", "net.safetensors")


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """A model from a user's module; its trained weights are in ``net.safetensors``."""
    (tmp_path / "own_nets.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_nets

    net = own_nets.net((2, 16), 3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        net(torch.randn(32, 2, 16, generator=draw) + 1)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    yield net.eval()
    sys.modules.pop("own_nets")


def served_model(**options):
    defaults = {"model": "own_nets:net", "weights": Path("net.safetensors"), "shape": (2, 16)}
    defaults |= {"classes": CLASSES, "rule": "pseudo"}
    return ServedModel.from_weights(**(defaults | options))


def test_served_model_has_own_weights_and_statistics(own_model):
    served = served_model()
    x = torch.randn(4, 2, 16)
    torch.testing.assert_close(served.model(x), own_model(x), rtol=0, atol=0)
    assert served.classes == CLASSES
    torch.testing.assert_close(served.prior["1"].mean, own_model[1].running_mean, rtol=0, atol=0)
    assert served.prior["1"].mean.abs().min() > 0, "the statistics must differ from their initial values"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ("sit",)}, "two different classes or more"),
        ({"classes": ("sit", "sit", "lie")}, "two different classes or more"),
        ({"classes": ("sit", "walk")}, "classifier for other classes than the 2 of --classes"),
        ({"weights": Path("nowhere.safetensors")}, "no weights at nowhere"),
        ({"model": "own_nets:plain"}, "the weights in net.safetensors (lack|have)"),
        ({"model": "own_nets:nat"}, "Did you mean 'net'"),
        ({"rule": "population"}, "needs statistics of training users"),
        ({"rule": "rotation"}, "needs labeled sums of training users"),
        ({"rule": "tent"}, "test-time method"),
        ({"rule": "pseudo/adwin/decay"}, "own drift detector"),
        ({"shape": (2,)}, "cannot take windows of shape \\[2\\]"),
    ],
)
def test_served_model_rejects_bad_input(own_model, options, message):
    with pytest.raises(UserError, match=message):
        served_model(**options)


@pytest.mark.parametrize(
    ("name", "message"), [("plain", "no layer that keeps any"), ("short", "instead of \\[2, 3\\]")]
)
def test_served_model_rejects_unsuitable_models(own_model, name, message):
    import own_nets

    save_file(getattr(own_nets, name)(3).state_dict(), f"{name}.safetensors")
    with pytest.raises(UserError, match=message):
        served_model(model=f"own_nets:{name}", weights=Path(f"{name}.safetensors"))


def test_served_model_supports_rules_without_training_users(own_model):
    for name, kind in rules().items():
        if not kind.requires:
            assert served_model(rule=name).prior.keys() == {"1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "name a scenario, or your own --model"),
        (["serve", "hapt", "--shape", "6,128"], "name a scenario, or your own --model"),
        (["serve", "hapt", "--weights", "net.safetensors"], "and no scenario"),
        ([*SERVE_OWN], "needs --model, --shape and --classes"),
        ([*SERVE_OWN, "--shape", "2,x", "--classes", "a,b"], "--shape takes positive whole numbers"),
        (["serve", "hapt", "--host", "0.0.0.0"], "accepts requests from other machines"),
        (["serve", "hapt", "--capacity", "0"], "--capacity must be at least 1"),
        (["serve", "hapt", "--tls-key", "key.pem"], "--tls-key needs the certificate"),
        (["serve", "hapt", "--user-rate", "-1"], "--user-rate must be 0 or more"),
        (["serve", "nowhere"], "unknown scenario"),
        (["serve", "hapt", "--rule", "psuedo"], "unknown rule"),
        (["serve", "hapt", "--rule", "rotations"], "Did you mean 'rotation'"),
        (["serve", "digits8", "--rule", "rotation"], "needs to know the channels"),
        ([*SERVE_OWN, "--shape", "2,16", "--classes", "a,b,c", "--rule", "auto"], "needs seen users to decide"),
        (["serve", "hapt", "--drift", "adwim"], "unknown drift detector"),
        (["demo", "digits8"], "recordings of motion"),
    ],
)
def test_commands_reject_bad_input(own_model, arguments, message, monkeypatch):
    monkeypatch.setattr(
        "fedbn_simulations.adaptation.source_model.train_source_model",
        lambda *a: pytest.fail("trained before it was checked"),
    )
    result = CliRunner().invoke(cli, [*arguments, "--port", "0", "--rounds", "1"])
    assert result.exit_code != 0
    assert message in str(result.exception)


def test_command_has_the_defaults_of_access():
    parameters = inspect.signature(serve).parameters
    assert Access().rate == parameters["rate"].default == 500
    for name in ("host", "token", "body", "timeout", "user_rate"):
        assert getattr(Access(), name) == parameters[name].default
    assert parameters["durability"].default == "full"


def test_second_service_on_a_store_is_refused_before_training(own_model, monkeypatch):
    monkeypatch.setattr(
        "fedbn_simulations.adaptation.source_model.train_source_model",
        lambda *a: pytest.fail("trained before it was checked"),
    )
    SQLiteStore("taken.db").close()
    taken = SQLiteStore("taken.db")
    result = CliRunner().invoke(cli, ["serve", "hapt", "--port", "0", "--store", "taken.db"])
    assert "store taken.db is in use by another process" in str(result.exception)
    taken.close()


@pytest.mark.slow
def test_serve_command_keeps_users_after_restart(own_model, tmp_path):
    command = [sys.executable, "-c", "from fedbn_simulations.cli import main; main()", *SERVE_OWN]
    command += ["--shape", "2,16", "--classes", ",".join(CLASSES), "--port", "0", "--rule", "pseudo:n0=64"]
    environment = {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    learned = []
    for _ in range(2):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
        try:
            line = process.stderr.readline()
            match = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert match, line + process.stderr.read()

            def send(method, path, url=match[0], **body):
                request = Request(f"{url}{path}", json.dumps(body).encode(), method=method)
                request.add_header("content-type", "application/json")
                with urlopen(request, timeout=10) as response:
                    return json.loads(response.read())

            send("PUT", "/v1/users/ann")
            window = torch.randn(2, 16).tolist()
            answer = send("POST", "/v1/users/ann/observe", windows=[window])["answers"][0]
            assert answer["name"] == CLASSES[answer["class"]]
            learned.append(send("GET", "/v1/users/ann")["learned"])
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0  # saves all users, as after Ctrl-C
        finally:
            process.kill()
            process.stderr.close()
    assert learned == [1, 2]
