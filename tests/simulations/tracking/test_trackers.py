"""Trackers log the values of runs; problems are reported before work starts."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import uuid
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest

from fedbn.errors import UserError
from fedbn_simulations.experiments.compare import compare
from fedbn_simulations.experiments.experiment import Experiment
from fedbn_simulations.experiments.tasks import Event, Task
from fedbn_simulations.flower.processes import GROUP_VARIABLE
from fedbn_simulations.tracking.trackers import TRACKERS, Tracker, Tracking, open_tracker
from tests.helpers import PYTHONPATH, wait_until
from tests.integration.processes import MARK, kill_marked, marked


class Memory(Tracker):
    """Records all calls."""

    name, package = "memory", "none"
    instance = None

    def __init__(self, directory):
        self.calls = []
        Memory.instance = self

    begin, log, end, close = (
        lambda self, *arguments, name=name: self.calls.append((name, *arguments))
        for name in ("begin", "log", "end", "close")
    )


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """The option of a tracker that records all calls."""
    monkeypatch.setitem(TRACKERS, "memory", Memory)
    return f"memory:{tmp_path / 'memory'}"


@pytest.fixture(scope="module")
def experiment():
    plan = {"rounds": 2, "eval_every": 1, "global_test": 20}
    values = {"scenario": "digits8:users=4:unseen=1:images=600", "strategies": ("global-naive", "fedbn"), "plan": plan}
    return Experiment.from_dict(values | {"seeds": 1}).resolved()


def tracked(experiment, out, *texts):
    with Tracking(texts) as tracking:
        compare(experiment, out, workers=1, report=tracking.report, started=tracking.started)


def expected(out, strategy):
    """Curve and mean own test accuracy in the result of a run."""
    result = next(r for p in out.glob("runs/*/result.json") if (r := json.loads(p.read_text()))["strategy"] == strategy)
    own = [e["accuracy"] for e in result["evaluations"] if (e["row"], e["column"]) == ("own", "aggregated")]
    return result["curve"], sum(own) / len(own)


def test_tracking_logs_runs(memory, experiment, tmp_path):
    tracked(experiment, tmp_path / "out", memory)
    calls = Memory.instance.calls
    runs = [line[1] for line in calls if line[0] == "begin"]
    assert len(runs) == len(set(runs)) == 2
    assert calls[-1] == ("close",)
    for run, strategy in zip(runs, experiment.strategies, strict=True):
        lines = [line for line in calls if line[1:2] == (run,)]
        assert [line[0] for line in lines] == ["begin", "log", "log", "log", "end"]
        assert lines[0][2]["strategy"] == strategy
        assert lines[0][2]["plan.rounds"] == 2
        curve, own = expected(tmp_path / "out", strategy)
        for line, point in zip(lines[1:3], curve, strict=True):
            assert line[2] == point["round"]
            assert line[3] == {k: point[k] for k in ("train_loss", "own", "unseen")}
        assert math.isclose(lines[3][3]["own/aggregated"], own)


def test_tracking_skips_finished_runs(memory, experiment, tmp_path):
    tracked(experiment, tmp_path / "out")
    tracked(experiment, tmp_path / "out", memory)
    assert Memory.instance.calls == [("close",)]


def test_tracking_begins_resumed_run(memory, experiment):
    task = Task(experiment.run("fedbn", 0), "run")
    with Tracking([memory]) as tracking:
        tracking.started("comparing", [task])
        tracking.report(Event("run", 1))  # from the checkpoint, without values
        tracking.report(Event("run", 2, values={"own": 0.5}))
    assert [line[0] for line in Memory.instance.calls] == ["begin", "log", "close"]


def test_log_run_sanitizes_names_and_drops_nonfinite_values(memory):
    with Tracking([memory]) as tracking:
        tracking.log_run("bouts:length=6/a b", {"k": 1}, {3: {"a=1": 0.5, "invalid": math.nan}, 4: {"n": 2}})
    name = "bouts-length-6-a-b"
    assert Memory.instance.calls == [
        ("begin", name, {"k": 1}),
        ("log", name, 3, {"a-1": 0.5}),
        ("log", name, 4, {"n": 2.0}),
        ("end", name),
        ("close",),
    ]


@pytest.mark.slow
def test_adapt_logs_training_and_every_rule(memory, tmp_path, run_cli):
    arguments = ["adapt", "digits8:images=600", "--rules", "pseudo:n0=8", "--streams", "iid", "--seeds", 1]
    arguments += ["--rounds", 1, "--starts", "cold,recording"]
    code, out, err = run_cli(*arguments, "--out", "out", "--json", "--track", memory)
    assert code == 0, err
    rows = {row["rule"]: row for row in json.loads(out)}
    calls = Memory.instance.calls
    training, *rules = [line for line in calls if line[0] == "begin"]
    assert training[2]["strategy"] == "global-naive"
    assert [line[0] for line in calls if line[1:2] == (training[1],)] == ["begin", "log", "log", "end"]
    assert len(rules) == len(rows) == 6
    for _, name, settings in rules:
        lines = [line for line in calls if line[0] == "log" and line[1] == name]
        rule = settings["rule"] + ", from recording" * (settings["start"] == "recording")
        assert lines[-1][3]["accuracy"] == pytest.approx(rows[rule]["accuracy"])
        assert lines[-1][2] > 1
        assert len(lines) <= 101
        steps = [line[2] for line in lines]
        assert steps == sorted(set(steps))
        curve = pd.read_parquet(tmp_path / "out" / "accuracy_curve.parquet").query("stream == 'iid'")
        curve = curve[(curve["start"] == settings["start"]) & (curve["rule"] == settings["rule"])]
        logged = [line[3]["fading_accuracy"] for line in lines if "fading_accuracy" in line[3]]
        assert logged == curve.set_index("window")["accuracy"][steps].tolist()


def test_claims_logs_every_seed(memory, run_cli):
    arguments = ["claims", "bn-speed", "--quick", "--seeds", 2, "--workers", 1, "--json", "--track", memory]
    code, out, err = run_cli(*arguments)
    assert code == 0, err
    (entry,) = json.loads(out)
    begin, *logs, end, close = Memory.instance.calls
    assert begin[:2] == ("begin", "bn-speed")
    assert begin[2]["sentence"] == entry["sentence"]
    assert [line[3]["effect"] for line in logs] == entry["effects"]
    for arm, values in entry["values"].items():
        assert [line[3][arm] for line in logs] == values
    assert logs[-1][3]["effect_low"] == entry["low"]
    assert (end, close) == (("end", "bn-speed"), ("close",))


@pytest.mark.slow
def test_tensorboard_values(experiment, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked(experiment, tmp_path / "out", f"tensorboard:{tmp_path / 'tb'}")
    (path,) = (tmp_path / "tb").glob("fedbn-s0*")
    events = EventAccumulator(str(path))
    events.Reload()
    curve, own = expected(tmp_path / "out", "fedbn")
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [
        (p["round"], pytest.approx(p["train_loss"])) for p in curve
    ]
    assert events.Scalars("own/aggregated")[-1].value == pytest.approx(own)


@pytest.mark.slow
def test_mlflow_values(experiment, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    tracked(experiment, tmp_path / "out", f"mlflow:{tmp_path / 'ml'}")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'ml' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("fedbn").experiment_id])
    assert {r.info.status for r in runs} == {"FINISHED"}
    (run,) = (r for r in runs if r.data.params["strategy"] == "fedbn")
    curve, own = expected(tmp_path / "out", "fedbn")
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(m.step, m.value) for m in history] == [(p["round"], p["train_loss"]) for p in curve]
    assert run.data.metrics["own/aggregated"] == pytest.approx(own)
    assert not Path("mlruns").exists()


@pytest.mark.slow
def test_wandb_offline_files(experiment, tmp_path):
    pytest.importorskip("wandb")
    tracked(experiment, tmp_path / "out", f"wandb:{tmp_path / 'wb'}")
    files = list((tmp_path / "wb" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert b"own/aggregated" in files[0].read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensorbord:x", "Did you mean 'tensorboard'"),
        ("tensorboard", "write tensorboard:DIR"),
        ("mlflow:", "write mlflow:DIR"),
    ],
)
def test_open_tracker_rejects_bad_input(text, message):
    with pytest.raises(UserError, match=message):
        open_tracker(text)


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow"), ("wandb", "wandb")]
)
def test_open_tracker_reports_missing_package(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"needs the package .*pip install 'fedbn\[trackers\]'"):
        open_tracker(f"{name}:{tmp_path}")


def test_open_tracker_reports_unwritable_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        open_tracker(f"tensorboard:{tmp_path / 'file' / 'below'}")


def test_all_trackers_are_listed():
    assert set(TRACKERS) >= {"tensorboard", "mlflow", "wandb"}


# A tracker with a process, a thread that is no daemon, and events that it writes until it is closed.
TRACKED = """
import subprocess, sys, time
from fedbn_simulations.cli.app import main
from fedbn_simulations.tracking import trackers


class Starting(trackers.Tracker):
    name, package, starts_processes = "starting", "none", True

    def __init__(self, directory):
        child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        self.child = subprocess.Popen([sys.executable, "-c", child], start_new_session=True)

    def begin(self, run, settings):
        print("tracking", flush=True)

    def log(self, run, step, values): ...
    def end(self, run): ...
    def close(self): self.child.kill()


trackers.TRACKERS["starting"] = Starting
if __name__ == "__main__":
    sys.argv = ["fedbn", "compare", "digits8", "--rounds", "2000", "--strategies", "fedbn", "--workers", "1",
                *(part for text in sys.argv[1:] for part in ("--track", text))]
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("texts", [("starting:own",), ("starting:own", "tensorboard:tb", "mlflow:ml", "wandb:wb")])
def test_trackers_end_with_their_parent(texts, signum, tmp_path, monkeypatch):
    packages = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
    installed = [t for t in texts if find_spec(packages.get(t.partition(":")[0], "json"))]
    (tmp_path / "tracked.py").write_text(TRACKED)
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    command = [sys.executable, "tracked.py", *installed]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout.readline() == "tracking\n"
        assert len(marked(mark)) >= 3  # the command, the process of the tracker, the guardian
        process.send_signal(signum)
        assert process.wait(60) == (-signum if signum == signal.SIGKILL else 130)
    try:
        assert wait_until(lambda: not marked(mark), 60)
    finally:
        kill_marked(mark)


def test_tracking_restores_environment_if_a_tracker_cannot_be_opened(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="needs the package wandb"):
        Tracking([f"wandb:{tmp_path}"])
    assert GROUP_VARIABLE not in os.environ
