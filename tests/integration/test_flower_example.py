"""The example app in examples/flower-app runs, and its two lines make the difference."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib

import pytest

from tests.flower_apps import simulate
from tests.helpers import ROOT

EXAMPLE = ROOT / "examples" / "flower-app"


@pytest.fixture
def accuracy(capsys, monkeypatch):
    """A function that loads and runs the example, and returns the accuracy that it prints."""
    monkeypatch.syspath_prepend(EXAMPLE)
    config = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]

    def run():
        modules = (config["components"][name].partition(":")[0] for name in ("serverapp", "clientapp"))
        server, client = (importlib.import_module(module).app for module in modules)
        simulate(server, client, 4, config["config"])
        for name in [name for name in sys.modules if name.partition(".")[0] == "cameras"]:
            del sys.modules[name]
        return float(re.search(r"accuracy (\d\.\d+)", capsys.readouterr().out)[1])

    return run


@pytest.mark.slow
def test_example_app_is_better_with_its_two_lines(accuracy, monkeypatch):
    personal = accuracy()
    monkeypatch.setattr(
        "fedbn_clients.mods.normalization", lambda *_: lambda message, context, app: app(message, context)
    )
    monkeypatch.setattr("fedbn_simulations.flower.strategies.normalization", lambda strategy, *_: strategy)
    plain = accuracy()
    print(f"with {personal}, without {plain}")
    assert personal > 0.9
    assert plain < personal - 0.1
