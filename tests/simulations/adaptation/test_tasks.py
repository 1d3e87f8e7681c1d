"""Adaptation studies of tasks other than plain classification."""

from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from fedbn.errors import UserError
from fedbn.federation.run import task_of
from fedbn.plugins import build
from fedbn.streams import streams
from fedbn.tasks import parse_task
from fedbn.tta import methods
from fedbn_simulations.adaptation.cells import SOURCE
from fedbn_simulations.adaptation.methods import AdaptationMethod, check_classes
from fedbn_simulations.adaptation.metric import StudyMetric
from fedbn_simulations.adaptation.plots import users_figure
from fedbn_simulations.adaptation.results import metric_of, summary, users_frame, write
from fedbn_simulations.adaptation.study import Study, run_study
from fedbn_simulations.adaptation.tables import summary_table, table
from fedbn_simulations.results.formatting import capitalize, metric_title
from tests.fedbn.tasks import test_end_to_end as targets

MODELS = {"map": "tests.fedbn.tasks.networks:maps", "sequence": "tests.fedbn.tasks.networks:sequences"}
CASES = {
    "regression": ("number", "mae", ("rmse", "r2", "loss")),
    "multilabel": ("labels", "accuracy", ("macro_f1", "auroc", "loss")),
    "segmentation": ("map", "accuracy", ("dice", "iou", "loss")),
    "sequence": ("sequence", "accuracy", ("macro_f1", "loss")),
    "tests.fedbn.tasks.test_end_to_end:Custom": ("number", "loss", ("within_one",)),
}


def study_of(folder, kind, task, **values):
    path = targets.save(folder, kind)
    given = {
        "scenario": f"files:path={path}:unseen=1",
        "model": MODELS.get(kind, "mlp"),
        "task": task,
        "rules": ("pseudo:n0=4.0", "ema:rate=0.3/adwin/decay"),
        "streams": ("natural",),
        "starts": ("cold", "recording"),
        "seeds": 2,
        "rounds": 2,
    }
    return Study.from_dict(given | values)


@pytest.fixture(
    scope="module",
    params=[pytest.param(task, marks=[] if task == "regression" else pytest.mark.slow) for task in CASES],
)
def finished(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks")
    kind, metric, others = CASES[request.param]
    study, results, _ = run_study(study_of(place, kind, request.param), place / "out")
    return place, study, results, metric, others


def test_study_of_every_task_uses_its_metric(finished):
    place, study, results, metric, others = finished
    found = write(place / "out", study, results, "")
    users = users_frame(results)
    assert metric_of(study).name == metric
    assert {metric, f"faded_{metric}", *others} <= set(users.columns)
    assert {metric, *others} <= set(found.columns)
    better = 1 if task_of(study).directions[metric] else -1
    lines = found.set_index("rule")
    for rule in lines.index:
        values, source = (users[users["label"] == name][metric].to_numpy() for name in (rule, SOURCE))
        assert lines.loc[rule, metric] == pytest.approx(values.mean())
        assert lines.loc[rule, "gain"] == pytest.approx(better * (values - source).mean())
        assert lines.loc[rule, "worst"] == (values.min() if better > 0 else values.max())
    assert set(lines.index) >= {SOURCE, "bound-own", "pseudo:n0=4.0, from recording"}
    assert "bound-balanced" not in lines.index
    assert lines.loc["pseudo:n0=4.0", "loss"] != lines.loc[SOURCE, "loss"]
    assert lines.loc[SOURCE, "forgotten"] == pytest.approx(0, abs=1e-6)
    assert lines.loc["pseudo:n0=4.0", "reset_exact"]
    assert lines.loc["ema:rate=0.3/adwin/decay", "false_alarms_per_1000"] >= 0
    curve = pd.read_parquet(place / "out" / f"{metric}_curve.parquet")
    cold = [traces for c, (traces, _) in results.items() if (c.rule, c.start) == (SOURCE, "cold")]
    line = curve[(curve["rule"] == SOURCE) & (curve["start"] == "cold")][metric].to_numpy()
    assert line[0] == pytest.approx(np.mean([t.values[0] for traces in cold for t in traces]))
    assert (place / "out" / f"{metric}_curve.png").stat().st_size > 10_000
    assert json.loads((place / "out" / "adapt.json").read_text())["metric"] == metric
    console = Console(width=100, file=io.StringIO())
    console.print(summary_table(found, study, metric_of(study), 100))
    shown = " ".join(console.file.getvalue().split())
    assert shown.startswith(f"{capitalize(metric_title(metric))} on unseen users' streams")
    assert shown.count("harmed") == len(found) + 2
    assert ("differences above 0 are improvements" in table(found, metric)) is (metric != "accuracy")


def test_study_of_every_task_resumes_from_its_cells(finished, monkeypatch):
    place, study, results, *_ = finished
    monkeypatch.setattr("fedbn_simulations.adaptation.cells.run_cell", lambda *a: pytest.fail("computed again"))
    _, again, _ = run_study(study, place / "out")
    pd.testing.assert_frame_equal(users_frame(again), users_frame(results), check_exact=True)
    for cell, (traces, _) in results.items():
        for one, other in zip(traces, again[cell][0], strict=True):
            assert (one.user, one.digest) == (other.user, other.digest)
            np.testing.assert_array_equal(one.values, other.values)
            np.testing.assert_array_equal(one.losses, other.losses)


def test_study_of_another_metric_changes_harm_and_direction(finished):
    _, study, results, metric, others = finished
    other = StudyMetric.of(task_of(study), "r2" if "r2" in others else others[0])
    users = users_frame(results)
    found = summary(results, users, other).set_index("rule")
    better = 1 if other.higher_is_better else -1
    for rule in found.index:
        values, source = (users[users["label"] == name][other.name].to_numpy() for name in (rule, SOURCE))
        limit = 0.01 if other.is_share else 0.01 * np.abs(source)
        assert found.loc[rule, "harmed"] == pytest.approx(np.mean(better * (source - values) > limit + 1e-12))
    figure = users_figure(users, found.reset_index(), other)
    crosses = [len(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() == "x"]
    shown = [rule for rule in found.index if rule != SOURCE]
    assert sorted(crosses) == sorted(round(found.loc[rule, "harmed"] * 2) for rule in shown)
    assert metric in users


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rules": ("class-residual",)}, "rule 'class-residual' learns by class, and task 'regression' has no class"),
        ({"rules": ("pseudo:guard=true",)}, "choose a rule without classes, gate=, diversity= and guard="),
        ({"rules": ("tent",)}, "method 'tent' needs the entropy of class probabilities, and task 'regression' has no"),
        ({"rules": ("lame",)}, "method 'lame' needs class probabilities, which it smooths, and task 'regression'"),
        ({"rules": ("ema/ask",)}, "'ask' asks for classes, and task 'regression' has none: leave it out"),
        ({"starts": ("classes",)}, "start 'classes' selects windows by class, .*: choose cold or recording"),
        ({"streams": ("bouts",)}, "stream 'bouts' selects windows by class, .*: choose natural or iid"),
        ({"metric": "accuracy"}, "unknown metric 'accuracy'"),
    ],
)
def test_study_without_classes_refuses_what_needs_them(tmp_path, values, message):
    with pytest.raises(UserError, match=message) as error:
        study_of(tmp_path, "number", "regression", **values).resolved()
    assert "\n" not in str(error.value)


def test_every_method_and_stream_that_needs_classes_says_so():
    task = parse_task("regression")
    for name, cls in methods().items():
        with pytest.raises(UserError, match=f"^method '{name}' needs .* class probabilities.*: choose a rule"):
            check_classes(task, [AdaptationMethod(build(cls, {}, name))], [], [])
    needing = {name for name, cls in streams().items() if cls.needs_classes}
    assert needing == {"bouts", "dirichlet", "foreign", "ptta", "sorted"}
