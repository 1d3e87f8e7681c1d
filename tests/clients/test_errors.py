"""No content of an exception leaves a client; its log has the details."""

from __future__ import annotations

import json
import os
import re
import traceback

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedbn.config import Plan
from fedbn.errors import UserError
from fedbn.federation import loop
from fedbn.federation.failures import CLIENT_LOG, CODES, LOG_VARIABLE, ClientError, classify, client_log, report
from fedbn.federation.run import Run, plan_for
from fedbn.federation.setup import build_context
from fedbn.strategies.base import strategies
from fedbn_clients import app as client_module
from fedbn_clients import jobs
from fedbn_clients.app import app as client_app
from fedbn_clients.errors import describe_error
from fedbn_simulations.engines.execute import execute
from fedbn_simulations.engines.grid import InProcessGrid
from fedbn_simulations.experiments.tasks import Task, run_task
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.rounds import run_rounds
from fedbn_simulations.storage.checkpoint import save_outcome
from tests.exceptions import ERRORS, EXPECTED, SECRET, is_private
from tests.helpers import mostly_slow

WITHOUT_TEXT = ("tensor", "unreadable", "UnicodeDecodeError", "JSONDecodeError")
"""Exceptions whose text does not contain the private text."""

SCENARIO = "digits8:users=3:unseen=0"
LAST = 2
"""User whose client fails."""


@pytest.fixture
def small():
    """A function that returns a run with few steps."""

    def make(strategy="fedbn", **settings):
        values = {"rounds": 1, "batch_size": 256, "eval_every": 1, "global_test": 20} | settings
        return Run(SCENARIO, strategy, plan=plan_for(SCENARIO, **values)).resolved()

    return make


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Path of the clients' log."""
    monkeypatch.setenv(LOG_VARIABLE, str(tmp_path / "log" / "clients.log"))
    return tmp_path / "log" / "clients.log"


def failing(error, function=None):
    """A function that raises, for the last user only if it replaces ``function``."""

    def fail(ctx, user, *args, **options):
        if function is not None and user != LAST:
            return function(ctx, user, *args, **options)
        raise error

    return fail


@pytest.mark.parametrize("name", ERRORS)
def test_classify_shows_no_content(name):
    found = classify(ERRORS[name])
    assert found.code in CODES
    assert not is_private(found)
    assert (found.code, found.name) == EXPECTED.get(name, (found.code, found.name))


@pytest.mark.parametrize("name", ERRORS)
def test_client_replies_without_content_of_exception(name, log, monkeypatch):
    """Sends a message to the ClientApp itself, without the grid, as a SuperNode does."""
    monkeypatch.setattr(client_module, "_inputs", lambda *args: (_ for _ in ()).throw(ERRORS[name]))
    if name == "StopIteration":  # cannot leave a generator
        monkeypatch.setattr(client_module, "_inputs", failing(ERRORS[name]))
    grid = InProcessGrid(client_app, 1, {})
    context = grid.partition_context(0)
    context.state["client-state-0"] = record = ConfigRecord({"round": 3})
    with task_identity(1):
        message = Message(RecordDict({"config": ConfigRecord({"round": 4})}), context.node_id, "train")
        reply = client_app(message, context)
    assert reply.has_error()
    assert not is_private(reply.error)
    assert not is_private(describe_error(reply.error))
    assert (reply.error.code, reply.error.reason) == EXPECTED.get(name, (reply.error.code, reply.error.reason))
    assert context.state == RecordDict({"client-state-0": record})
    text = log.read_text()
    assert "train, round 4, partition 0, node 1000000" in text
    assert is_private(text) or name in WITHOUT_TEXT
    assert log.stat().st_mode & 0o777 == 0o600


STAGES = {
    "first batch": ("client_sync_first_batch", "fedtan"),
    "train": ("client_round", "fedbn"),
    "statistics": ("client_sync_statistics", "global-recalibrated"),
    "evaluate": ("client_evaluation", "fedbn"),
}


@pytest.mark.parametrize("engine", ["grid", "grid:stacked", "reference"])
@pytest.mark.parametrize("stage", mostly_slow(STAGES, "train", "evaluate"))
def test_engines_show_no_content_of_exception(stage, engine, small, log, monkeypatch):
    function, strategy = STAGES[stage]
    for module in (jobs, loop):
        monkeypatch.setattr(module, function, failing(ValueError(SECRET), getattr(module, function)))
    if engine == "grid:stacked":
        monkeypatch.setattr("fedbn.stacked.executors.ClientExecutor._evaluate_stacked", failing(ValueError(SECRET)))
        monkeypatch.setattr("fedbn.stacked.executors.ClientExecutor._train_parts", failing(ValueError(SECRET)))
    with pytest.raises(ClientError, match=r"user 2.*: ValueError \(code 100: .*\); the log of this client") as caught:
        execute(small(strategy), engine)
    assert not is_private("".join(traceback.format_exception(caught.value)))
    assert SECRET in log.read_text()


def test_strategy_and_protection_show_no_content_of_exception(small, log, monkeypatch):
    run = small()
    for place in (f"{strategies()['fedbn'].__module__}", "fedbn_clients.app.protect_update"):
        with monkeypatch.context() as patch:
            if place == "fedbn_clients.app.protect_update":
                patch.setattr(place, failing(TypeError(SECRET)))
            else:
                patch.setattr(strategies()["fedbn"], "after_local_training", failing(TypeError(SECRET)), raising=False)
            with pytest.raises(ClientError, match=r"user 0: TypeError \(code 100") as caught:
                execute(run, "grid")
        assert not is_private(caught.value)


def test_tolerated_error_shows_no_content_in_stored_results(small, log, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "client_round", failing(LookupError(SECRET), jobs.client_round))
    run = small(tolerate=0.4)
    directory = tmp_path / "out" / "runs" / run.id
    run_task(Task(run, str(directory)), "grid", lambda event: None)
    notices = json.loads((directory / "result.json").read_text())["notices"]
    assert any("train, user 2: LookupError (code 100: an error in the program)" in notice for notice in notices)
    for file in directory.iterdir():
        assert is_private(file.read_bytes().decode(errors="replace")) == (file.name == CLIENT_LOG), file


def test_run_task_names_log_of_clients(small, tmp_path, monkeypatch):
    for engine, module in (("grid", jobs), ("reference", loop)):
        run = small()
        directory = tmp_path / engine / "runs" / run.id
        with monkeypatch.context() as patch:
            patch.setattr(module, "client_round", failing(LookupError(SECRET)))
            with pytest.raises(ClientError) as caught:
                run_task(Task(run, str(directory)), engine, lambda event: None)
        assert str(caught.value).endswith(f"the log of this client has the details: {directory / CLIENT_LOG}")
        assert SECRET in (directory / CLIENT_LOG).read_text()
    assert LOG_VARIABLE not in os.environ


BAD_FILES = {
    "cell": ("csv", f"x0,x1,y\n1,{SECRET},0\n2,3,1\n"),
    "label": ("csv", f"x0,x1,y\n1,2,{SECRET}\n2,3,1\n"),
    "header": ("csv", f"{SECRET},y\n1,2\n"),
    "not an archive": ("npz", SECRET),
    "not a table": ("parquet", SECRET),
    "rows": ("npz", {"x": np.full((8, 2), np.nan), SECRET: np.arange(8)}),
    "texts": ("npz", {"x": np.zeros((8, 2)), "y": np.full(8, SECRET)}),
    "missing": ("npz", None),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_of_node_shows_no_content(name, log, tmp_path):
    suffix, content = BAD_FILES[name]
    path = tmp_path / f"{SECRET}.{suffix}"
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        np.savez(path, **content)
    run = Run("remote:users=1:classes=2:shape=2:unseen=0", "fedbn", model="mlp", plan=Plan(rounds=1)).resolved()
    grid = InProcessGrid(client_app, 1, {"run": run.to_json()})
    grid.partition_context(0).node_config["data"] = str(path)
    with task_identity(1), pytest.raises(ClientError, match=r"^train, user 0: \w+ \(code 10\d: ") as caught:
        run_rounds(grid, run)
    assert not is_private(caught.value)
    assert SECRET in log.read_text()


def test_bad_file_on_own_machine_has_readable_error(tmp_path):
    path = tmp_path / f"{SECRET}.csv"
    path.write_text(f"x0,x1,y,user\n1,{SECRET},0,a\n")
    run = Run(f"files:path={path}:unseen=0", "fedbn", model="mlp", plan=Plan(rounds=1))
    with pytest.raises(UserError, match=re.escape(SECRET)):
        build_context(run.resolved())


def test_log_in_node_config_comes_first(log, tmp_path, small, monkeypatch):
    monkeypatch.setattr(jobs, "client_round", failing(LookupError(SECRET)))
    run = small()
    grid = InProcessGrid(client_app, 3, {"run": run.to_json()})
    for user in range(3):
        grid.partition_context(user).node_config["log"] = str(tmp_path / f"{user}.log")
    with task_identity(1), pytest.raises(ClientError):
        run_rounds(grid, run)
    assert not log.exists()
    assert all(SECRET in (tmp_path / f"{user}.log").read_text() for user in range(3))


def test_report_falls_back_to_standard_error(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv(LOG_VARIABLE, str(tmp_path / "file" / "clients.log"))
    assert report("train, user 3", OSError(SECRET)).name == "OSError"
    assert SECRET in caplog.text
    assert "train, user 3" in caplog.text


def test_client_log_restores_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(LOG_VARIABLE, "before")
    with pytest.raises(ClientError, match=r"^failed$"), client_log(tmp_path / "log"):
        raise ClientError("failed")
    assert os.environ[LOG_VARIABLE] == "before"


@pytest.mark.parametrize("reason", [SECRET, "a b", "x" * 65, "", None, "A\n", "é"])
@pytest.mark.parametrize("code", [0, 1, 2, 3, 8, 99, 100, 105, 106, -1])
def test_describe_error_shows_no_text_of_client(code, reason):
    text = describe_error(Error(code, reason))
    assert not is_private(text)
    assert "\n" not in text
    assert len(text) < 200


def test_interrupt_is_not_an_error_of_the_client(small, monkeypatch):
    monkeypatch.setattr(jobs, "client_round", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        execute(small(), "grid:one")


def test_checkpoint_of_tolerated_error_shows_no_content(small, log, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "client_round", failing(LookupError(SECRET), jobs.client_round))
    run = small(tolerate=0.4)
    save_outcome(tmp_path / "c", run, execute(run, "grid"))
    assert b"LookupError" in (tmp_path / "c").read_bytes()
    assert not is_private((tmp_path / "c").read_bytes().decode(errors="replace"))
