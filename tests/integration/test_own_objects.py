"""The example of own objects: the same numbers on every engine."""

from __future__ import annotations

import importlib

import pytest

import fedbn
from simulations.engines.deployment import differences
from tests.helpers import ROOT


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
