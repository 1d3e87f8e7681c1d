"""Tests of advice: the best strategy per cell, comparable strategies, and reversals between own and pooled tests."""

from __future__ import annotations

import pytest

from fedbn.errors import UserError
from fedbn.files import read_json, write_json
from fedbn_simulations.experiments.compare import compare
from fedbn_simulations.experiments.experiment import Experiment
from fedbn_simulations.report.documents import replace_block
from fedbn_simulations.results.advice import advice, verdict
from fedbn_simulations.results.comparison import Comparison

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("advice")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    values = {"scenario": "digits8", "strategies": ["global-naive", "local", "nonorm", "centralized"], "seeds": 1}
    values |= {"partition": "shard:shards=2:clients=8", "plan": {"rounds": 3, "eval_every": 3}}
    out = tmp_path_factory.mktemp("advice") / "shards"
    compare(Experiment.from_dict(values), out, workers=1)
    # Three rounds are too few for most strategies to reach the floor.
    write_json(out / "comparison.json", read_json(out / "comparison.json") | {"floor": None})
    return out


def test_verdict_excludes_bounds(directory):
    result = verdict(Comparison.load(directory), "own", "aggregated")
    assert result.best != "centralized"
    assert "centralized" not in result.comparable


def test_verdict_excludes_networks_that_did_not_learn(directory):
    comparison = Comparison.load(directory)
    best = comparison.matrix().query("row != 'worst'").groupby("strategy")["mean"].max()
    comparison.meta["floor"] = best["nonorm"] + 1e-6
    assert comparison.unlearned == [s for s in comparison.strategies if best[s] <= best["nonorm"]]
    result = verdict(comparison, "global", "aggregated")
    assert "nonorm" not in (result.best, *result.comparable)
    assert ("as aggregated", "no normalization †") in comparison.wide().index
    assert ("as aggregated", "local training") in comparison.wide().index


def test_verdict_has_highest_mean(directory):
    comparison = Comparison.load(directory)
    matrix = comparison.matrix().query("row == 'own' and column == 'aggregated' and strategy != 'centralized'")
    result = verdict(comparison, "own", "aggregated")
    assert result.mean == matrix["mean"].max()
    assert len(result.comparable) + result.clearly_behind == len(matrix) - 1
    for other in result.comparable:
        assert not comparison.contrast(result.best, other, "own", "aggregated", "accuracy").users.excludes_zero


def test_advice_reports_reversal(directory):
    text = advice([directory])
    assert "| shards | `local`" in text
    assert "Reversals:" in text
    assert "shards: `local` is best on users' own tests" in text


def test_replace_block_between_markers(tmp_path):
    page = tmp_path / "which.md"
    page.write_text("a\n<!-- begin advice -->\nold\n<!-- end advice -->\nb\n")
    replace_block(page, "advice", "new\n")
    assert page.read_text() == "a\n<!-- begin advice -->\nnew\n<!-- end advice -->\nb\n"
    with pytest.raises(UserError, match="has no block for x"):
        replace_block(page, "x", "new\n")
