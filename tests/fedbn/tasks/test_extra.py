"""Metrics of the user: on every engine, in both directions, and errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassCohenKappa

import fedbn
from fedbn.errors import UserError
from fedbn.tasks import parse_task
from fedbn.tasks.classification import Classification
from fedbn.tasks.extra import metric_name, metric_text
from fedbn.tasks.regression import Regression
from fedbn_simulations.engines.deployment import differences

HERE = f"{__name__}:"


def confidence(outputs, y):
    """Mean probability of the correct class."""
    return outputs.softmax(1).gather(1, y[:, None]).mean()


def surprise(outputs, y):
    return -confidence(outputs, y).log()


surprise.higher_is_better = False


def undefined(outputs, y):
    return float("nan")


def failing(outputs, y):
    raise IndexError("too far")


def text(outputs, y):
    return "high"


def accuracy(outputs, y):
    return 1.0


NOTHING = 3


def population():
    rng = np.random.default_rng(0)
    y = np.arange(96) % 3
    x = rng.normal(size=(96, 4)).astype(np.float32)
    x[np.arange(96), y] += 2
    return fedbn.Population.from_arrays(x, y, user=np.repeat(["ana", "bob", "cem"], 32))


def run(engine="grid", strategy="fedbn", **options):
    return fedbn.federate(population(), strategy, engine=engine, rounds=2, batch_size=8, **options)


@pytest.mark.parametrize(
    "metric", [confidence, lambda outputs, y: confidence(outputs, y), MulticlassCohenKappa(num_classes=3)]
)
def test_metric_objects_agree_on_engines(metric):
    reference, grid, stacked = (run(engine, metric=metric) for engine in ("reference", "grid", "grid:stacked"))
    name = metric_name(metric_text(metric))
    assert differences(reference.outcome, grid.outcome) == ()
    assert reference.to_pandas()[name].nunique() > 1
    np.testing.assert_allclose(stacked.to_pandas()[name], reference.to_pandas()[name], atol=1e-5)
    assert stacked.outcome.execution["evaluate"] != ["one by one"]
    assert differences(reference.outcome, run(metric=metric_text(metric)).outcome) == ()


def test_metric_is_an_option_of_the_task():
    task = parse_task(f"classification:extra_metrics={HERE}surprise+{HERE}confidence:smoothing=0.1")
    assert task == Classification(smoothing=0.1).with_metric(HERE + "surprise").with_metric(HERE + "confidence")
    assert (task.directions["surprise"], task.directions["confidence"], task.main_metric) == (False, True, "accuracy")
    outputs, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    found = task.evaluate(outputs, y)
    assert found["surprise"] == float(surprise(outputs, y))
    assert set(found) == set(task.directions)
    assert set(Classification().with_metric(HERE + "undefined").evaluate(outputs, y)) == set(
        Classification().directions
    )
    assert Classification(extra_metrics=(HERE + "confidence",)).is_cross_entropy
    errors = Regression().with_metric(metric_text(MeanAbsoluteError)).evaluate(outputs[:, :1], outputs[:, :1] + 2)
    assert errors["mean_absolute_error"] == pytest.approx(2, rel=1e-6)


def test_comparison_displays_the_metric(tmp_path, quick_reports):
    options = {"rounds": 1, "seeds": 1, "engine": "grid", "progress": False, "out": tmp_path}
    found = fedbn.compare(population(), ["fedavg", "fedbn"], metric=surprise, **options)
    assert (found.metric, found.higher_is_better()) == ("surprise", False)
    means = found.matrix().query("row == 'own' and column == 'aggregated'").set_index("strategy")["mean"]
    assert means[found.best()] == means.min()
    assert fedbn.load(tmp_path).metric == "surprise"


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (3, r"metric must be a text, a function \(outputs, y\) or a metric of torchmetrics, not 3"),
        ("acuracy", "unknown metric 'acuracy'. Did you mean 'accuracy'"),
        (failing, "metric '.*:failing' fails on outputs of shape .*: IndexError: too far"),
        (text, "metric '.*:text' must return a number, not a str"),
        (accuracy, "already has a metric 'accuracy'; rename the function"),
        (HERE + "surprises", "unknown metric in .* 'surprises'. Did you mean 'surprise'"),
        (HERE + "NOTHING", "is a int, which cannot be called: name a function"),
        ("nowhere.at.all:mine", "cannot import 'nowhere.at.all'"),
    ],
)
def test_unusable_metrics_are_refused_in_one_sentence(metric, message):
    with pytest.raises(UserError, match=message) as caught:
        run(metric=metric)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Undeclared(Classification):
    name = "undeclared"

    def scores(self, outputs, y):
        return {"acc": 1.0}


@dataclass(frozen=True)
class Tensors(Classification):
    name = "tensors"

    def scores(self, outputs, y):
        return {"accuracy": torch.ones(())}


@dataclass(frozen=True)
class Broken(Classification):
    name = "broken"

    def scores(self, outputs, y):
        raise KeyError("no such class")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Undeclared, "task 'undeclared' returns acc, which its metrics do not list"),
        (Tensors, r"task 'tensors' returns a Tensor as accuracy: convert it with float\(...\)"),
        (Broken, "task 'broken' cannot score outputs of shape .*: KeyError: 'no such class'"),
    ],
)
def test_tasks_with_wrong_scores_are_refused_before_training(task, message):
    with pytest.raises(UserError, match=message):
        run(task=task)
