"""Advice: the best of each cell, who is not clearly behind, and the reversal between own and pooled tests."""

from __future__ import annotations

import pytest

from fedbn.errors import UserError
from simulations.experiments.compare import compare
from simulations.experiments.experiment import Experiment
from simulations.report.documents import replace_block
from simulations.results.advice import advice, verdict
from simulations.results.comparison import Comparison

pytestmark = pytest.mark.xdist_group("advice")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    values = {
        "scenario": "digits8",
        "strategies": ["global-naive", "local", "nonorm", "centralized"],
        "seeds": 1,
        "partition": "shard:shards=2:clients=8",
        "plan": {"rounds": 3, "eval_every": 3},
    }
    out = tmp_path_factory.mktemp("advice") / "shards"
    return compare(Experiment.from_dict(values), out, workers=1)


def test_a_bound_is_never_advised(directory):
    found = verdict(Comparison.load(directory), "own", "aggregated")
    assert found.best != "centralized"
    assert "centralized" not in found.beside


def test_the_best_has_the_highest_mean_and_the_rest_are_beside_or_behind(directory):
    comparison = Comparison.load(directory)
    matrix = comparison.matrix().query("row == 'own' and column == 'aggregated' and strategy != 'centralized'")
    found = verdict(comparison, "own", "aggregated")
    assert found.mean == matrix["mean"].max()
    assert len(found.beside) + found.clearly_behind == len(matrix) - 1
    for other in found.beside:
        assert not comparison.contrast(found.best, other, "own", "aggregated", "accuracy").users.excludes_zero


def test_the_reversal_under_label_skew_is_stated(directory):
    text = advice([directory])
    assert "| shards | `local`" in text
    assert "Reversals:" in text
    assert "shards: `local` is best on users' own tests" in text


def test_it_goes_between_its_markers(tmp_path):
    page = tmp_path / "which.md"
    page.write_text("a\n<!-- begin advice -->\nold\n<!-- end advice -->\nb\n")
    replace_block(page, "advice", "new\n")
    assert page.read_text() == "a\n<!-- begin advice -->\nnew\n<!-- end advice -->\nb\n"
    with pytest.raises(UserError, match="has no block for x"):
        replace_block(page, "x", "new\n")
