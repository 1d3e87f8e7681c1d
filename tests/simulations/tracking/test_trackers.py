"""Trackers write the numbers of the runs and nothing else; what is missing is said before work starts."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from fedbn.errors import UserError
from simulations.cli.app import app
from simulations.experiments.compare import compare
from simulations.experiments.experiment import Experiment
from simulations.experiments.tasks import Event, Task
from simulations.tracking import trackers
from simulations.tracking.trackers import TRACKERS, Tracker, Tracking, tracker


class Notes(Tracker):
    """Remembers what it was told."""

    name, package = "notes", "none"
    made = None

    def __init__(self, directory):
        self.said = []
        Notes.made = self

    def begin(self, run, settings):
        self.said.append(("begin", run, settings))

    def log(self, run, step, values):
        self.said.append(("log", run, step, values))

    def end(self, run):
        self.said.append(("end", run))

    def close(self):
        self.said.append(("close",))


@pytest.fixture
def notes(monkeypatch):
    monkeypatch.setitem(TRACKERS, "notes", Notes)


@pytest.fixture(scope="module")
def experiment():
    return Experiment.from_dict(
        {
            "scenario": "digits8",
            "strategies": ("global-naive", "fedbn"),
            "seeds": 1,
            "plan": {"rounds": 2, "eval_every": 1, "global_test": 20},
        }
    ).resolved()


def tracked(experiment, out, *texts):
    with Tracking(texts) as tracking:
        compare(experiment, out, workers=1, report=tracking.report, started=tracking.started)


def expected(out, strategy):
    """Curve and mean of own test of a run, as its result says."""
    result = next(r for p in out.glob("runs/*/result.json") if (r := json.loads(p.read_text()))["strategy"] == strategy)
    own = [e["accuracy"] for e in result["evaluations"] if (e["row"], e["column"]) == ("own", "aggregated")]
    return result["curve"], sum(own) / len(own)


def test_what_a_tracker_is_told(notes, experiment, tmp_path):
    tracked(experiment, tmp_path / "out", f"notes:{tmp_path / 'notes'}")
    said = Notes.made.said
    runs = [line[1] for line in said if line[0] == "begin"]
    assert len(runs) == len(set(runs)) == 2
    assert said[-1] == ("close",)
    for run, strategy in zip(runs, experiment.strategies, strict=True):
        lines = [line for line in said if line[1:2] == (run,)]
        assert [line[0] for line in lines] == ["begin", "log", "log", "log", "end"]
        assert lines[0][2]["strategy"] == strategy
        assert lines[0][2]["plan.rounds"] == 2
        curve, own = expected(tmp_path / "out", strategy)
        for line, point in zip(lines[1:3], curve, strict=True):
            assert line[2] == point["round"]
            assert line[3] == {k: point[k] for k in ("train_loss", "own", "unseen")}
        assert math.isclose(lines[3][3]["own/aggregated"], own)


def test_finished_runs_are_not_told_again(notes, experiment, tmp_path):
    tracked(experiment, tmp_path / "out")
    tracked(experiment, tmp_path / "out", f"notes:{tmp_path / 'notes'}")
    assert Notes.made.said == [("close",)]


def test_a_run_that_goes_on_is_begun(notes, experiment):
    task = Task(experiment.run("fedbn", 0), "place")
    with Tracking(["notes:unused"]) as tracking:
        tracking.started("comparing", [task])
        tracking.report(Event("place", 1))  # what its checkpoint holds, measured before
        tracking.report(Event("place", 2, values={"own": 0.5}))
    assert [line[0] for line in Notes.made.said] == ["begin", "log", "close"]
    Path("unused").rmdir()


def test_a_run_told_whole_has_plain_names_and_finite_values(notes):
    with Tracking(["notes:unused"]) as tracking:
        tracking.tell("bouts:length=6/a b", {"k": 1}, {3: {"a=1": 0.5, "gone": math.nan}, 4: {"n": 2}})
    name = "bouts-length-6-a-b"
    assert Notes.made.said == [
        ("begin", name, {"k": 1}),
        ("log", name, 3, {"a-1": 0.5}),
        ("log", name, 4, {"n": 2.0}),
        ("end", name),
        ("close",),
    ]
    Path("unused").rmdir()


def test_personalize_tells_of_training_and_of_every_rule(notes, tmp_path):
    out = tmp_path / "out"
    arguments = ["adapt", "digits8", "--rules", "pseudo:n0=8", "--streams", "iid", "--seeds", "1"]
    arguments += ["--starts", "cold,recording", "--rounds", "1", "--out", str(out), "--json"]
    result = CliRunner().invoke(app, [*arguments, "--track", f"notes:{tmp_path / 'notes'}"])
    assert result.exit_code == 0, result.exception
    rows = {row["rule"]: row for row in json.loads(result.stdout)}
    said = Notes.made.said
    trained, *followed = [line for line in said if line[0] == "begin"]
    assert trained[2]["strategy"] == "global-naive"
    assert [line[0] for line in said if line[1:2] == (trained[1],)] == ["begin", "log", "log", "end"]
    assert len(followed) == len(rows) == 6
    for _, name, settings in followed:
        lines = [line for line in said if line[0] == "log" and line[1] == name]
        rule = settings["rule"] + ", from recording" * (settings["start"] == "recording")
        assert lines[-1][3]["accuracy"] == pytest.approx(rows[rule]["accuracy"])
        assert lines[-1][2] > 1
        assert len(lines) <= 101
        steps = [line[2] for line in lines]
        assert steps == sorted(set(steps))
        curve = pd.read_parquet(out / "course.parquet").query("stream == 'iid'")
        curve = curve[(curve["start"] == settings["start"]) & (curve["rule"] == settings["rule"])]
        told = [line[3]["fading_accuracy"] for line in lines if "fading_accuracy" in line[3]]
        assert told == curve.set_index("window")["accuracy"][steps].tolist()


def test_claims_tell_of_every_seed(notes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["claims", "bn-speed", "--quick", "--seeds", "2", "--workers", "1", "--json", "--track", "notes:there"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    (found,) = json.loads(result.stdout)
    begin, *logs, end, close = Notes.made.said
    assert begin[:2] == ("begin", "bn-speed")
    assert begin[2]["sentence"] == found["sentence"]
    assert [line[3]["effect"] for line in logs] == found["effects"]
    for arm, values in found["values"].items():
        assert [line[3][arm] for line in logs] == values
    assert logs[-1][3]["effect_low"] == found["low"]
    assert (end, close) == (("end", "bn-speed"), ("close",))


@pytest.mark.slow
def test_tensorboard(experiment, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked(experiment, tmp_path / "out", f"tensorboard:{tmp_path / 'tb'}")
    (place,) = (tmp_path / "tb").glob("fedbn-s0*")
    found = EventAccumulator(str(place))
    found.Reload()
    curve, own = expected(tmp_path / "out", "fedbn")
    assert [(e.step, e.value) for e in found.Scalars("train_loss")] == [
        (p["round"], pytest.approx(p["train_loss"])) for p in curve
    ]
    assert found.Scalars("own/aggregated")[-1].value == pytest.approx(own)


@pytest.mark.slow
def test_mlflow(experiment, tmp_path):
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
def test_wandb_offline(experiment, tmp_path):
    pytest.importorskip("wandb")
    tracked(experiment, tmp_path / "out", f"wandb:{tmp_path / 'wb'}")
    found = list((tmp_path / "wb" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(found) == 2
    assert b"own/aggregated" in found[0].read_bytes()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tensorbord:x", "Did you mean 'tensorboard'"),
        ("tensorboard", "say where to, as tensorboard:DIR"),
        ("mlflow:", "say where to, as mlflow:DIR"),
    ],
)
def test_mistakes(text, said):
    with pytest.raises(UserError, match=said):
        tracker(text)


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow"), ("wandb", "wandb")]
)
def test_a_package_that_is_missing(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"needs the package .*pip install 'fedbn\[trackers\]'"):
        tracker(f"{name}:{tmp_path}")


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        tracker(f"tensorboard:{tmp_path / 'file' / 'below'}")


def test_all_trackers_are_listed():
    assert set(trackers.TRACKERS) >= {"tensorboard", "mlflow", "wandb"}
