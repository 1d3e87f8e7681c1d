"""A model that a user brings is served as it is, under the user's names; what does not fit is said before it starts."""

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
from fedbn.online import rule
from fedbn.online.rules.base import rules
from simulations.cli.app import app as cli
from simulations.cli.service import serve
from simulations.service.access import Access
from simulations.service.model import Served

MINE = """
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


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's, and its weights after training."""
    (tmp_path / "minenets.py").write_text(textwrap.dedent(MINE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import minenets

    made = minenets.net((2, 16), 3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        made(torch.randn(32, 2, 16, generator=draw) + 1)
    save_file(made.state_dict(), tmp_path / "net.safetensors")
    yield made.eval()
    sys.modules.pop("minenets")


def brought(**changed):
    given = {
        "model": "minenets:net",
        "weights": Path("net.safetensors"),
        "shape": (2, 16),
        "classes": CLASSES,
        "rule": rule("pseudo"),
    }
    return Served.brought(**(given | changed))


def test_what_is_served_is_the_users_model_weights_and_statistics(mine):
    served = brought()
    x = torch.randn(4, 2, 16)
    torch.testing.assert_close(served.model(x), mine(x), rtol=0, atol=0)
    assert served.classes == CLASSES
    torch.testing.assert_close(served.prior["1"].mean, mine[1].running_mean, rtol=0, atol=0)
    assert served.prior["1"].mean.abs().min() > 0, "statistics that never moved would show nothing"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"classes": ("sit",)}, "two different classes or more"),
        ({"classes": ("sit", "sit", "lie")}, "two different classes or more"),
        ({"classes": ("sit", "walk")}, "classifier for other classes than the 2 of --classes"),
        ({"weights": Path("nowhere.safetensors")}, "no weights at nowhere"),
        ({"model": "minenets:plain"}, "the weights in net.safetensors (lack|have)"),
        ({"model": "minenets:nat"}, "Did you mean 'net'"),
        ({"rule": rule("population")}, "needs what only training on users tells"),
        ({"shape": (2,)}, "cannot take windows of shape \\[2\\]"),
    ],
)
def test_what_does_not_fit_is_said(mine, changed, said):
    with pytest.raises(UserError, match=said):
        brought(**changed)


@pytest.mark.parametrize(("name", "said"), [("plain", "no layer that keeps any"), ("short", "not \\[2, 3\\]")])
def test_models_that_cannot_be_served(mine, name, said):
    import minenets

    save_file(getattr(minenets, name)(3).state_dict(), f"{name}.safetensors")
    with pytest.raises(UserError, match=said):
        brought(model=f"minenets:{name}", weights=Path(f"{name}.safetensors"))


def test_every_rule_that_needs_nothing_from_training_serves_such_a_model(mine):
    for name, kind in rules().items():
        if not kind.wants:
            assert brought(rule=rule(name)).prior.keys() == {"1"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a scenario, or your own --model"),
        (["hapt", "--shape", "6,128"], "name a scenario, or your own --model"),
        (["hapt", "--weights", "net.safetensors"], "and no scenario"),
        (["--weights", "net.safetensors", "--model", "minenets:net"], "wants --model, --shape and --classes"),
        (
            ["--weights", "net.safetensors", "--model", "minenets:net", "--shape", "2,x", "--classes", "a,b"],
            "--shape takes positive whole numbers",
        ),
    ],
)
def test_mistakes_on_the_command_line(mine, arguments, said, monkeypatch):
    monkeypatch.setattr(
        "simulations.adaptation.source_model.train_source_model",
        lambda *a: pytest.fail("trained before it was checked"),
    )
    result = CliRunner().invoke(cli, ["serve", *arguments, "--port", "0"])
    assert result.exit_code != 0
    assert said in str(result.exception)


def test_requests_are_limited_unless_one_says_otherwise():
    assert Access().rate == inspect.signature(serve).parameters["rate"].default == 500


@pytest.mark.slow
def test_the_command_serves_it_and_its_users_survive_a_restart(mine, tmp_path):
    names = ",".join(CLASSES)
    command = [sys.executable, "-c", "from simulations.cli import main; main()", "serve", "--model", "minenets:net"]
    command += ["--weights", "net.safetensors", "--shape", "2,16", "--classes", names, "--port", "0"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    learnt = []
    for _ in range(2):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
        try:
            line = process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert found, line + process.stderr.read()

            def ask(method, path, where=found[0], **body):
                asked = Request(f"{where}{path}", json.dumps(body).encode(), method=method)
                asked.add_header("content-type", "application/json")
                with urlopen(asked, timeout=10) as answer:
                    return json.loads(answer.read())

            ask("PUT", "/v1/users/ann")
            window = torch.randn(2, 16).tolist()
            answer = ask("POST", "/v1/users/ann/observe", windows=[window])["answers"][0]
            assert answer["name"] == CLASSES[answer["class"]]
            learnt.append(ask("GET", "/v1/users/ann")["learnt"])
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == -signal.SIGTERM  # once everything is written, it dies of what it was told
        finally:
            process.kill()
            process.stderr.close()
    assert learnt == [1, 2]
