"""The examples of own objects: the same numbers on every engine."""

from __future__ import annotations

import importlib

import pytest

import fedbn
from fedbn_simulations.engines.deployment import differences
from tests.helpers import ROOT


@pytest.fixture
def everything(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("own_everything")


def run_everything(everything, engine):
    options = everything.OPTIONS | {"lr": 0.01, "batch_size": 8, "rounds": 2, "eval_every": 1}
    return fedbn.federate(everything.users, everything.LocalStatistics, engine=engine, **options)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("own_objects")


def run(example, engine, data=None):
    strategy = example.DampedStatistics(share=0.8)
    return fedbn.federate(
        data or example.population, strategy, model=example.Net, engine=engine, rounds=2, eval_every=1
    )


@pytest.mark.slow
def test_own_objects_are_equal_in_loop_and_grid(example):
    reference = run(example, "reference")
    assert differences(reference.outcome, run(example, "grid").outcome) == ()
    assert differences(reference.outcome, run(example, "reference", example.population()).outcome) == ()
    stacked = run(example, "grid:stacked").to_pandas()
    assert stacked["accuracy"].to_numpy() == pytest.approx(reference.to_pandas()["accuracy"].to_numpy())


@pytest.mark.ray
def test_own_objects_are_equal_on_ray(example):
    assert differences(run(example, "grid").outcome, run(example, "ray").outcome) == ()


def test_own_everything_is_short_and_documented():
    source = (ROOT / "examples" / "own_everything.py").read_text()
    assert len([line for line in source.splitlines() if line.strip()]) <= 25
    assert f"```python\n{source}```" in (ROOT / "docs" / "objects.md").read_text()


@pytest.mark.slow
def test_own_everything_is_equal_in_loop_and_grid(everything):
    reference = run_everything(everything, "reference")
    assert differences(reference.outcome, run_everything(everything, "grid").outcome) == ()
    auto, scores = run_everything(everything, "grid:auto"), reference.to_pandas()
    for metric in ("dice", "sensitivity", "loss"):
        assert auto.to_pandas()[metric].to_numpy() == pytest.approx(scores[metric].to_numpy(), abs=5e-3)
    plan = reference.run.plan
    assert (plan.optimizer, plan.augment) == ("torch.optim.adamw:AdamW", "own_everything:noisy")
    assert reference.run.task == "own_everything:Focal:extra_metrics=own_everything:sensitivity"


@pytest.mark.ray
def test_own_everything_is_equal_on_ray(everything):
    assert differences(run_everything(everything, "grid").outcome, run_everything(everything, "ray").outcome) == ()
