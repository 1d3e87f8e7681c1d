"""Strategies compared in a user's app: metrics of the app, finished runs, and errors in one sentence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedbn.errors import UserError
from fedbn_simulations.experiments import app_comparison, app_runs
from fedbn_simulations.experiments.app_comparison import AppExperiment, compare_app
from fedbn_simulations.experiments.app_runs import Evaluations, directions, execute_app
from fedbn_simulations.experiments.compare import resume
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.results.comparison import Comparison
from tests.helpers import ROOT

MESSAGES = ROOT / "tests" / "apps" / "messages"


@pytest.fixture
def in_this_process(monkeypatch):
    """Execute runs in this process, because starting others takes seconds. Returns the executed runs."""
    executed = []

    def execute(runs, out, workers, report):
        for run in runs:
            executed.append(run)
            report(run, app_comparison.execute_run(run, out))

    monkeypatch.setattr(app_comparison, "_execute", execute)
    return executed


def experiment(**changes):
    config = ("num-server-rounds=1 seeded=false fraction-evaluate=0.5",)
    options = {"app": MESSAGES, "strategies": ("fedavg", "fedbn"), "seeds": 2, "num_supernodes": 4}
    return AppExperiment(**options | {"run_config": config} | changes)


def test_compare_app_stores_metrics_of_every_client_and_keeps_finished_runs(in_this_process, tmp_path):
    out = compare_app(experiment(), tmp_path, command="fedbn compare ...")
    comparison = Comparison.load(out)
    assert comparison.strategies == ["global-naive", "fedbn"]
    assert set(comparison.evaluations["user"]) == {"0", "1", "2", "3"}  # the server selects two of them
    assert len(comparison.evaluations) == 2 * 2 * 4
    means = comparison.matrix("eval_mse").set_index(["strategy", "row"])["mean"]
    assert means["fedbn", "own"] < means["global-naive", "own"]
    assert not any("seed" in notice for notice in comparison.notices)
    values = comparison.values("fedbn", "own", "aggregated", "eval_mse")
    assert (values[0] != values[1]).all()
    assert (comparison.ownership["bytes_up"] == comparison.ownership["bytes"]).all()
    assert len(in_this_process) == 4
    compare_app(experiment(strategies=("fedavg", "fedbn", "silobn")), tmp_path)
    assert [(r.strategy, r.seed) for r in in_this_process[4:]] == [("silobn", 0), ("silobn", 1)]
    with pytest.raises(UserError, match="run its command again"):
        resume(tmp_path)


def test_compare_app_does_not_mix_results_of_other_settings(in_this_process, tmp_path):
    compare_app(experiment(strategies=("fedbn",), seeds=1), tmp_path / "out")
    app = tmp_path / "app"
    shutil.copytree(MESSAGES, app)
    changes = {"run_config": ("num-server-rounds=1",)}, {"num_supernodes": 2}, {"app": app}
    for change, text in zip(changes, ("another run-config", "another number of nodes", "another app"), strict=True):
        with pytest.raises(UserError, match=f"out has results with {text}, which .* choose another --out"):
            compare_app(experiment(**change), tmp_path / "out")
    (app / ".venv").mkdir()
    (app / ".venv" / "more.py").write_text("")
    with pytest.raises(UserError, match="has results with another app, which"):
        compare_app(experiment(app=app), tmp_path / "out")
    (app / "messages" / "more.py").write_text("")
    with pytest.raises(UserError, match="another app and other files of the app"):
        compare_app(experiment(app=app), tmp_path / "out")
    assert len(in_this_process) == 1


def test_compare_app_says_that_an_app_sets_its_own_seed(in_this_process, tmp_path):
    config = ("num-server-rounds=1 seeded=true",)
    out = compare_app(experiment(strategies=("fedbn",), run_config=config), tmp_path)
    assert any(n.startswith("Different seeds give equal results") for n in Comparison.load(out).notices)


def test_compare_app_names_the_run_that_failed_and_its_log(in_this_process, tmp_path):
    config = ("out='missing/directory/a.pt' num-server-rounds=1",)
    with pytest.raises(UserError, match=r"global-naive, seed 0: RuntimeError: .* \(log: .*run.log\)") as caught:
        compare_app(experiment(run_config=config), tmp_path)
    log = str(caught.value).rpartition("log: ")[2].rstrip(")")
    assert "Traceback" in Path(log).read_text()
    assert "[ROUND 1/1]" in Path(log).read_text()


def test_compare_app_separates_the_files_that_runs_write(in_this_process, tmp_path, monkeypatch):
    """Flower's examples write final_model.pt, or a directory that must not exist, into the working directory."""
    monkeypatch.chdir(tmp_path)
    config = ("out='final_model.pt' num-server-rounds=1",)
    compare_app(experiment(strategies=("fedavg", "fedbn"), seeds=1, run_config=config), Path("results"))
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    assert len(list(Path("results").glob("runs/*/files/final_model.pt"))) == 2


def test_compare_app_reports_an_app_without_metrics(tmp_path):
    (run, *_) = experiment(strategies=("groupnorm",), run_config=("num-server-rounds=0",)).runs()
    with (
        (tmp_path / "log").open("w") as log,
        pytest.raises(UserError, match="the clients of the app report no metrics"),
    ):
        execute_app(run, log, tmp_path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"strategies": ("fedavg", "global-naive")}, "strategies given twice: global-naive"),
        ({"strategies": ("fedbn", "fixbn")}, "'fixbn' needs control over local training"),
        ({"run_config": ("epochs=1",)}, "unknown run-config key 'epochs'"),
        ({"model": "messages.task:Model"}, "has no 'Model'"),
        (
            {"app": ROOT / "tests" / "apps" / "sklearn", "run_config": ()},
            "an app without a PyTorch network has no",
        ),
    ],
)
def test_compare_app_checks_everything_before_the_first_run(changes, text, in_this_process, tmp_path):
    with pytest.raises(UserError, match=text):
        compare_app(experiment(**changes), tmp_path)
    assert not in_this_process


def reply_to(kind, node, content, group="", config=None):
    with task_identity(1):
        message = Message(RecordDict(config or {}), node, kind, group_id=group)
        return message, Message(content, reply_to=message)


def test_evaluations_read_numbers_of_both_interfaces_and_count_rounds():
    found = Evaluations()
    config = {"config": ConfigRecord({"server-round": 2})}
    new = RecordDict({"metrics": MetricRecord({"eval_acc": 0.5, "num-examples": 7})})
    found.add(*reply_to("evaluate", 10, new, config=config))
    former = RecordDict(
        {
            "evaluateres.loss": MetricRecord({"loss": 0.25}),
            "evaluateres.num_examples": MetricRecord({"num_examples": 7}),
            "evaluateres.metrics": ConfigRecord({"accuracy": 0.75, "name": "x", "best": True}),
        }
    )
    found.add(*reply_to("evaluate", 11, former, group="3"))
    for _ in range(2):
        found.add(*reply_to("evaluate.fast", 12, new))
    found.add(*reply_to("evaluate", 13, Error(2, "broken")))
    found.add(*reply_to("query", 13, new))
    assert found.by_kind["evaluate"] == {
        2: {10: {"eval_acc": 0.5, "num-examples": 7.0}, 12: {"eval_acc": 0.5, "num-examples": 7.0}},
        3: {11: {"loss": 0.25, "num_examples": 7.0, "accuracy": 0.75}},
        1: {12: {"eval_acc": 0.5, "num-examples": 7.0}},
    }
    assert found.errors == ["broken"]


def test_directions_show_accuracies_first():
    assert directions(["train_loss", "r2", "eval_acc", "num_examples", "MSE"]) == {
        "eval_acc": True,
        "train_loss": False,
        "r2": True,
        "MSE": False,
    }
    assert next(iter(directions(["train_loss", "r2", "eval_acc"]))) == "eval_acc"


def test_seed_of_the_run_config_is_the_seed_of_the_run(monkeypatch, tmp_path):
    configs = []

    def simulate(server, client, nodes, run_config, **options):
        configs.append(run_config)

    monkeypatch.setattr(app_runs, "run_simulation", simulate)
    monkeypatch.setattr(app_runs, "SEED_KEYS", ("num-server-rounds",))
    run = experiment(strategies=("fedbn",), run_config=()).runs()[1]
    with (tmp_path / "log").open("w") as log, pytest.raises(UserError, match="no metrics"):
        execute_app(run, log, tmp_path)
    assert configs[0]["num-server-rounds"] == 1


@pytest.mark.slow
def test_compare_command_compares_strategies_in_an_app(run_cli, tmp_path):
    app = ROOT / "tests" / "apps" / "numpy_client"
    model = ("--model-fn", "numpyclient.task:make_net")
    code, out, err = run_cli(
        "compare", "--app", app, *model, "--strategies", "fedavg,fedbn,groupnorm", "--seeds", 2, "--out", "r", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert {line["strategy"] for line in found["matrix"]} == {"global-naive", "fedbn", "groupnorm"}
    assert (tmp_path / "r" / "report.html").exists()
    assert "6/6" in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--rounds", 3), "--rounds does not go with --app.*change them with --run-config"),
        (("digits8",), "SCENARIO does not go with --app"),
        (("--tune", "lr=0.1"), "--tune does not go with --app"),
    ],
)
def test_compare_command_rejects_options_without_meaning_for_an_app(arguments, text, run_cli):
    code, _, err = run_cli("compare", "--app", MESSAGES, *arguments)
    assert code == 2
    assert re.search(text, err)


def test_compare_command_rejects_options_of_apps_without_one(run_cli):
    code, _, err = run_cli("compare", "digits8", "--model-fn", "a:b")
    assert code == 2
    assert "go with --app: name the directory of the app" in err
