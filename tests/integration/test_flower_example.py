"""The example app in examples/flower-app runs, and its one line makes the difference."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib

import pytest

from clients.mods import NormalizationMod
from tests.flower_apps import simulate
from tests.helpers import ROOT

EXAMPLE = ROOT / "examples" / "flower-app"


@pytest.fixture
def accuracy(capsys, monkeypatch):
    """A function that runs the example and returns the accuracy that it prints."""
    monkeypatch.syspath_prepend(EXAMPLE)
    config = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]

    def run():
        modules = (config["components"][name].partition(":")[0] for name in ("serverapp", "clientapp"))
        server, client = (importlib.import_module(module).app for module in modules)
        simulate(server, client, 4, config["config"])
        return float(re.search(r"accuracy (0\.\d+|1\.0+)", capsys.readouterr().out)[1])

    yield run
    for name in [name for name in sys.modules if name.partition(".")[0] == "cameras"]:
        del sys.modules[name]


@pytest.mark.slow
def test_example_app_is_better_with_its_mod(accuracy, monkeypatch):
    with_mod = accuracy()
    monkeypatch.setattr(
        NormalizationMod, "__call__", lambda self, message, context, call_next: call_next(message, context)
    )
    without = accuracy()
    assert with_mod > 0.8
    assert without < with_mod - 0.2
