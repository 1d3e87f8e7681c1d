from __future__ import annotations

import os
import sys
import types
from functools import cache, partial

import hypothesis
import pytest
import torch
import typer
from click import Command

from fedbn.federation.run import Run, plan_for
from fedbn.federation.setup import build_context
from fedbn.scenarios.base import scenarios
from fedbn.stacked.memory import collect_garbage_rarely, keep_freed_memory
from fedbn_clients.app import _build_context as client_contexts
from fedbn_simulations.cli import app as cli
from fedbn_simulations.cli.quiet import add_quiet_option
from tests.helpers import make_reports_quick
from tests.unequal import Unequal

os.environ["LANGUAGE"] = "C"  # otherwise Click searches the disk for translations of each option
collect_ignore = ["apps"]  # Flower apps, which are imported only while they run

hypothesis.settings.register_profile("fedbn", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("fedbn")


def pytest_collection_finish():
    """Garbage collections leave out modules and tests, which live as long as the process."""
    keep_freed_memory()
    collect_garbage_rarely()


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def small(monkeypatch):
    """A function that returns a short run on users with different numbers of rows, class mixes and cameras."""
    return partial(_short_run, monkeypatch, "unequal")


@pytest.fixture
def small_with_recordings(monkeypatch):
    """Like `small`, but training and test data consist of one to four recordings of different lengths."""
    return partial(_short_run, monkeypatch, "unequal:recordings=4")


def _short_run(monkeypatch, scenario, strategy="global-naive", **settings):
    monkeypatch.setitem(scenarios(), Unequal.name, Unequal)
    run = {k: settings.pop(k) for k in ("seed", "model", "partition", "shift", "validation") if k in settings}
    plan = plan_for(scenario, **{"rounds": 2, "batch_size": 32, "eval_every": 1, "global_test": 60, **settings})
    return Run(scenario, strategy, plan=plan, **run).resolved()


@pytest.fixture
def register_model(monkeypatch):
    """A function that registers a model by the text that it returns."""

    def register(make):
        module = types.ModuleType("registered_models")
        module.make = make
        monkeypatch.setitem(sys.modules, "registered_models", module)
        for known in (build_context, client_contexts):
            known.cache_clear()  # they may have another model with the same text
        return "registered_models:make"

    return register


@pytest.fixture
def quick_reports(monkeypatch):
    """Reports with few resamples."""
    make_reports_quick(monkeypatch)


@cache
def _command_line() -> Command:
    """The command ``fedbn``. Typer takes 50 ms to build it."""
    return typer.main.get_command(add_quiet_option(cli.app))


@pytest.fixture
def run_cli(tmp_path, monkeypatch, capsys, quick_reports):
    """Run a command in this process, in a temporary directory. Returns exit code, output, and errors on one line."""
    monkeypatch.setattr(cli, "add_quiet_option", lambda app: _command_line())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedbn", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return run
