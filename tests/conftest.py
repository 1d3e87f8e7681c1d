from __future__ import annotations

import sys
import types

import hypothesis
import pytest
import torch

from fedbn.federation.run import Run, plan_for
from simulations.cli import main

hypothesis.settings.register_profile("fedbn", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("fedbn")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def small():
    """A function that returns a short run on scikit-learn's digits."""

    def make(strategy="global-naive", **settings):
        run = {k: settings.pop(k) for k in ("seed", "model", "partition", "shift", "validation") if k in settings}
        scenario = "digits8:images=600"
        plan = plan_for(scenario, **{"rounds": 2, "batch_size": 32, "eval_every": 1, "global_test": 60, **settings})
        return Run(scenario, strategy, plan=plan, **run).resolved()

    return make


@pytest.fixture
def register_model(monkeypatch):
    """A function that registers a model by the text that it returns."""

    def register(make):
        module = types.ModuleType("registered_models")
        module.make = make
        monkeypatch.setitem(sys.modules, "registered_models", module)
        return "registered_models:make"

    return register


@pytest.fixture
def run_cli(tmp_path, monkeypatch, capsys):
    """Run a command in this process, in a temporary directory. Returns exit code, output, and errors on one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedbn", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return run
