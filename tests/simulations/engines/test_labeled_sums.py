"""Labeled sums in all engines."""

from dataclasses import replace

import pytest
import torch

from fedbn.config import Plan
from fedbn.errors import UserError
from fedbn.federation.run import Run
from fedbn_simulations.engines.execute import execute
from fedbn_simulations.storage.checkpoint import load_outcome, save_outcome

RUN = Run("digits8:users=3:unseen=1", "silobn", plan=Plan(rounds=1, eval_every=1)).resolved()
SUMS = ("image", "matched")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[t][k], b[t][k]) for t in a for k in a[t])


@pytest.fixture(scope="module")
def reference():
    return execute(RUN, "reference", sums=SUMS)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["grid", "grid:stacked"])
def test_grid_and_reference_have_the_same_sums(engine, reference):
    found = execute(RUN, engine, sums=SUMS)
    if engine == "grid":
        assert same(found.sums, reference.sums)
    assert list(found.sums) == list(SUMS)
    assert found.traffic.up == reference.traffic.up
    assert found.traffic.down == reference.traffic.down
    assert found.traffic.up["labeled sums"] > 0


@pytest.mark.slow
def test_sums_survive_the_checkpoint(reference, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_outcome(path, RUN, reference)
    assert same(load_outcome(path, RUN).sums, reference.sums)


@pytest.mark.slow
def test_sums_do_not_change_the_run(reference):
    plain = execute(RUN, "reference")
    assert plain.sums == {}
    assert plain.curve == reference.curve
    assert all(torch.equal(v, reference.server.state[k]) for k, v in plain.server.state.items())


@pytest.mark.parametrize(
    ("run", "sums", "message"),
    [
        (RUN, ("matchd",), "unknown alignment or head 'matchd'. Did you mean 'matched'"),
        (replace(RUN, scenario="digit-angles", model="", task=""), ("matched",), "needs classes"),
        (RUN, ("rotation",), "set triples of its Population"),
    ],
)
def test_sums_that_cannot_be_computed_are_refused(run, sums, message):
    with pytest.raises(UserError, match=message):
        execute(run, "grid", sums=sums)


@pytest.mark.ray
def test_ray_has_the_same_sums(reference):
    assert same(execute(RUN, "ray", sums=SUMS).sums, reference.sums)
