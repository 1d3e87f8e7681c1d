"""Runs of every task on every engine, and targets that do not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import fedbn
from fedbn.config import Plan
from fedbn.errors import UserError
from fedbn.federation.loop import federate
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from fedbn.tasks import Task, parse_task, render_task
from fedbn.tasks.regression import Regression
from fedbn_simulations.engines.deployment import differences
from fedbn_simulations.engines.execute import execute
from tests.fedbn.tasks.populations import MODELS, arrays
from tests.helpers import assert_engines_agree, mostly_slow

TASKS = {
    **{"class": "classification", "number": "regression", "labels": "multilabel"},
    **{"map": "segmentation", "sequence": "sequence"},
}
"""Kinds of targets, and the task that they are for."""


@dataclass(frozen=True)
class Custom(Task):
    """A task of a user, with the loss of a power of the absolute error."""

    name = "custom"
    about = "power of the absolute error"
    metrics = {"within_one": True}  # noqa: RUF012
    power: float = 1.0

    def output_shape(self, y, classes):
        return (1,)

    def losses(self, outputs, y):
        return ((outputs[:, 0] - y / 10).abs() + 0.1) ** self.power

    def scores(self, outputs, y):
        return {"within_one": float(((outputs[:, 0] - y / 10).abs() <= 1).double().mean())}


def save(folder, kind):
    """A file with targets of a kind."""
    path = folder / f"{kind}.npz"
    np.savez(path, **arrays(TASKS[kind]))
    return path


def run_of(folder, kind, task, **options):
    plan = Plan(rounds=4, batch_size=8, lr=0.1, eval_every=2, global_test=12)
    return Run(
        f"files:path={save(folder, kind)}",
        "fedbn",
        model=MODELS[TASKS[kind]],
        task=task,
        plan=replace(plan, **options),
    ).resolved()


CASES = {
    "classification:smoothing=0.1": ("class", "accuracy"),
    "classification:balanced=true": ("class", "accuracy"),
    "regression": ("number", "r2"),
    "regression:loss=huber": ("number", "r2"),
    "multilabel": ("labels", "accuracy"),
    "multilabel:balanced=true": ("labels", "accuracy"),
    "segmentation": ("map", "dice"),
    "segmentation:loss=both:background=false": ("map", "dice"),
    "sequence:weights=1+1+2": ("sequence", "accuracy"),
}


QUICK = (
    "classification:balanced=true",
    "regression:loss=huber",
    "multilabel",
    "segmentation",
    "sequence:weights=1+1+2",
)


@pytest.mark.parametrize("task", mostly_slow(CASES, *QUICK))
def test_task_engines_agree_and_learn(tmp_path, task):
    kind, metric = CASES[task]
    run = run_of(tmp_path, kind, task, local_epochs=4 if kind in ("map", "sequence") else 1)
    exact = assert_engines_agree(run)
    stacked = execute(run, "grid:stacked")
    assert stacked.execution["train"] != ["one by one"]
    for point, other in zip(exact.curve, stacked.curve, strict=True):
        assert other.train_loss == pytest.approx(point.train_loss, rel=1e-4)
    for user, scores in exact.scores.items():
        for a, b in zip(scores, stacked.scores[user], strict=True):
            assert b.metrics == pytest.approx(a.metrics, rel=1e-3, abs=1e-3)
    cells = [s.metrics[metric] for scores in exact.scores.values() for s in scores if s.row == "own"]
    assert np.mean(cells) > 0.6
    assert build_context(run).task.directions.keys() == exact.scores[0][0].metrics.keys()


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        ("number", "classification", r"labels are real numbers .* choose --task regression"),
        ("labels", "classification", r"multi-label.*choose --task multilabel"),
        ("map", "classification", r"as for segmentation; choose --task segmentation"),
        ("map", "sequence", r"sequence needs a row of class indices.*choose --task segmentation"),
        ("class", "segmentation", r"segmentation needs a map .*choose --task classification"),
        ("number", "multilabel", r"multilabel needs a column of 0 or 1 per label.*choose --task regression"),
    ],
)
def test_targets_that_do_not_fit_name_the_task_that_fits(tmp_path, kind, task, message):
    with pytest.raises(UserError, match=message):
        build_context(run_of(tmp_path, kind, task))


def test_task_of_the_scenario_keeps_the_identity_of_a_run(tmp_path):
    run = run_of(tmp_path, "class", "classification")
    assert run.task == ""
    assert run.id == replace(run, task="").id
    assert '"task"' not in run.to_json()
    assert replace(run, task="classification:smoothing=0.1").id != run.id


def test_partition_by_class_is_refused_without_classes(tmp_path):
    run = replace(run_of(tmp_path, "number", "regression"), partition="dirichlet:clients=2")
    with pytest.raises(UserError, match="deals rows by class, but these rows have none: use iid"):
        build_context(run)
    assert len(federate(replace(run, partition="iid:clients=2")).curve) == 4


@pytest.mark.parametrize("task", ["regression", "multilabel"])
def test_online_rules_that_learn_by_class_are_refused_without_classes(tmp_path, task):
    run = run_of(tmp_path, {"regression": "number", "multilabel": "labels"}[task], task, rounds=2)
    for rule in ("balanced", "pseudo:diversity=1", "pseudo:gate=0.5"):
        with pytest.raises(UserError, match=f"rule '.*' learns by class, and task '{task}' has no class prob"):
            build_context(replace(run, rule=rule))
    assert_engines_agree(replace(run, rule="pseudo"))


@pytest.mark.parametrize(("kind", "task"), [("number", "regression"), ("class", "classification:smoothing=0.1")])
@pytest.mark.parametrize("strategy", ["fedtan", "atp"])
def test_strategies_with_a_loss_of_their_own_are_refused_for_others(tmp_path, strategy, kind, task):
    run = replace(run_of(tmp_path, kind, task), strategy=strategy)
    with pytest.raises(UserError, match="computes the plain cross-entropy itself, which is not the loss of task"):
        build_context(run)
    build_context(replace(run_of(tmp_path, "class", "classification"), strategy=strategy))


def test_values_of_all_users_are_refused_where_data_stay_on_the_nodes():
    run = Run("remote:users=2:classes=2:shape=4", "fedbn", model="mlp", task="classification:balanced=true")
    with pytest.raises(UserError, match="needs values of all users' training targets.*set them as options"):
        build_context(run)


def test_windows_of_labels_are_refused_without_classes(tmp_path):
    path = save(tmp_path, "number")
    with pytest.raises(UserError, match="window= gives a window its most frequent label, which task 'regression'"):
        build_context(Run(f"files:path={path}:window=4", "fedbn", task="regression"))


def test_task_object_is_the_same_run_as_its_text(tmp_path):
    data = f"files:path={save(tmp_path, 'number')}"
    runs = [fedbn.federate(data, "fedavg", task=task, rounds=1).run for task in (Regression(loss_="mae"), Regression)]
    assert [run.task for run in runs] == ["regression:loss=mae", "regression"]
    assert run_of(tmp_path, "number", f"{Custom.__module__}:Custom:power=2.0").task.endswith(":Custom:power=2.0")


def test_task_class_of_a_module_trains_on_every_engine(tmp_path):
    run = run_of(tmp_path, "number", render_task(Custom(power=2.0)), lr=0.01)
    exact = assert_engines_agree(run)
    assert exact.scores[0][0].metrics.keys() == {"within_one", "loss"}
    assert execute(run, "grid:stacked").execution["train"] != ["one by one"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("regressor", "unknown task 'regressor'. Did you mean 'regression'"),
        ("nowhere.tasks:Mine", "cannot import 'nowhere.tasks'"),
        ("fedbn.errors:UserError", "must be a subclass of Task"),
        ("regression:los=mae", "Did you mean 'loss'"),
    ],
)
def test_unknown_tasks_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_task(text)


def test_task_of_a_notebook_is_named_by_its_content():
    def local():
        @dataclass(frozen=True)
        class Local(Custom):
            name = "local"
            share: float = 0.5

        return Local

    text = render_task(local()(share=0.25))
    assert text.startswith("memory:Local-")
    assert text.endswith(":share=0.25")
    assert render_task(local()(share=0.25)) == text
    assert parse_task(text).share == 0.25
    with pytest.raises(UserError, match="task must be a text or a Task, not 3"):
        render_task(3)


@pytest.mark.parametrize(
    ("kind", "task"), [("number", "regression"), ("labels", "multilabel"), ("map", "segmentation")]
)
def test_arrays_give_the_same_run_as_a_file(tmp_path, kind, task):
    path = save(tmp_path, kind)
    with np.load(path) as file:
        columns = dict(file)
    population = fedbn.Population.from_arrays(**columns, task=parse_task(task))
    options = {"model": MODELS[task], "task": task, "rounds": 2, "batch_size": 8}
    first, second = (fedbn.federate(data, "fedbn", **options) for data in (f"files:path={path}", population))
    assert differences(first.outcome, second.outcome) == ()
    assert first.population.classes == second.population.classes


def test_datasets_with_targets_of_a_task():
    x, y = torch.randn(20, 4), torch.rand(20)
    data = {name: (TensorDataset(x, y), TensorDataset(x[:8], y[:8])) for name in ("ana", "bob")}
    with pytest.raises(UserError, match="labels are real numbers .* choose --task regression"):
        fedbn.Population.from_datasets(data)
    population = fedbn.Population.from_datasets(data, task=Regression())
    assert torch.equal(population.users[0].train.y, y)
    with pytest.raises(UserError, match="task must be an object such as"):
        fedbn.Population.from_datasets(data, task="regression")
    with pytest.raises(UserError, match="classification needs one class index.*choose --task regression"):
        fedbn.federate(population, "fedavg")
