"""The displayed metric and its direction, from the task to tables, tuning and advice."""

from __future__ import annotations

import pytest

from fedbn.errors import UserError
from fedbn.files import write_json
from fedbn_simulations.api import load
from fedbn_simulations.experiments.compare import Task, compare, rank_candidates
from fedbn_simulations.experiments.experiment import Experiment
from fedbn_simulations.results.advice import advice
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.summary import answer
from tests.fedbn.tasks.test_end_to_end import save


def experiment(folder, **options):
    options = {"rounds": 2, "eval_every": 2, "batch_size": 8, "seeds": 1, "model": "mlp"} | options
    scenario = f"files:path={save(folder, 'number')}:unseen=0"
    return Experiment.from_dict(
        {"scenario": scenario, "task": "regression", "strategies": ("fedbn", "local")} | options
    )


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    out = tmp_path_factory.mktemp("regression") / "out"
    return compare(experiment(out.parent, metric="mae"), out, engine="reference", workers=1)


def test_comparison_shows_the_chosen_metric_and_stores_all(regression):
    comparison = Comparison.load(regression)
    assert comparison.metric == "mae"
    assert comparison.metrics == {"rmse": False, "mae": False, "r2": True, "loss": False}
    assert set(comparison.metrics) <= set(comparison.evaluations.columns)
    default, named = comparison.matrix(), comparison.matrix("mae")
    assert default.equals(named)
    assert not default.equals(comparison.matrix("r2"))
    worst, own = (default.query(f"row == '{row}' and column == 'aggregated'")["mean"] for row in ("worst", "own"))
    assert (worst.to_numpy() >= own.to_numpy()).all()


def test_metric_of_a_report_can_differ_from_that_of_the_comparison(regression):
    shown = load(regression, metric="r2")
    assert shown.matrix().equals(Comparison.load(regression).matrix("r2"))
    assert answer(shown) != answer(Comparison.load(regression))
    assert "R2" in shown.to_latex()
    with pytest.raises(UserError, match="unknown metric 'acuracy'.*Known: loss, mae, r2, rmse"):
        load(regression, metric="acuracy")


def test_advice_prefers_the_lower_value_of_an_error(regression):
    comparison = Comparison.load(regression)
    means = comparison.matrix().query("row == 'own' and column == 'aggregated'").set_index("strategy")["mean"]
    line = next(line for line in advice([regression]).splitlines() if line.startswith("| out"))
    assert f"`{means.idxmin()}`" in line.split("|")[2].split(";")[0]


def test_metric_is_no_part_of_the_identity_without_tuning(tmp_path):
    plain, chosen = experiment(tmp_path), experiment(tmp_path, metric="r2")
    assert plain.to_dict() == chosen.to_dict()
    assert (
        experiment(tmp_path, tune={"lr": ("0.1",)}).to_dict()
        != experiment(tmp_path, tune={"lr": ("0.1",)}, metric="r2").to_dict()
    )
    with pytest.raises(UserError, match="unknown metric 'accuracy'"):
        experiment(tmp_path, metric="accuracy").resolved()


@pytest.mark.parametrize(("higher", "best"), [(True, 0.3), (False, 0.1)])
def test_tuning_follows_the_direction_of_the_metric(tmp_path, higher, best):
    setup, tasks = experiment(tmp_path, tune={"lr": ("0.1", "0.2", "0.3")}), []
    for lr, value in ((0.1, 1.0), (0.2, None), (0.3, 2.0)):
        run = setup.run("fedbn", 0, tuned={"lr": lr})
        directory = tmp_path / str(lr)
        directory.mkdir()
        cell = {"row": "own", "column": "aggregated", "mae": value}
        write_json(directory / "result.json", {"evaluations": [cell]})
        tasks.append(Task(run, str(directory)))
    assert rank_candidates(setup, tasks, "mae", higher)["fedbn"][0] == {"lr": best}
