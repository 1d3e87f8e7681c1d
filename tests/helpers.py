"""Helpers shared by test modules."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from fedbn.federation.loop import federate
from fedbn.federation.setup import build_context, build_context_for, population_of
from fedbn.strategies.base import strategies
from fedbn_simulations.engines.execute import execute

ROOT = Path(__file__).parents[1]
"""Root of the repository."""
PYTHONPATH = os.pathsep.join(str(ROOT / name) for name in (".", "clients", "simulations"))
"""Directories of the packages, for processes that a test starts."""


def mostly_slow(values, *quick):
    """Parameters of a test that runs with the ``quick`` values by default, and with all in the slow suite."""
    values = [value if isinstance(value, tuple) else (value,) for value in values]
    quick = {value if isinstance(value, tuple) else (value,) for value in quick}
    assert quick <= set(values)
    return [pytest.param(*value, marks=() if value in quick else pytest.mark.slow) for value in values]


def make_reports_quick(patch):
    """Let reports draw few resamples, until the patch is undone."""
    patch.setattr("fedbn_simulations.results.inference.RESAMPLES", 50)


def wait_until(condition, seconds=120):
    """Wait until the condition is true. Returns whether it became true in time."""
    deadline = time.monotonic() + seconds
    while not (is_met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(is_met)


def nonempty(values):
    """List of values. Assertions about none could not fail, for example in a loop over matches of a pattern."""
    values = list(values)
    assert values
    return values


trained = cache(federate)
"""The outcome of a run in the reference loop, computed once per process; tests do not change it."""


def federated(run):
    """Context and outcome of a run in the reference loop, which tests do not change."""
    return build_context(run), trained(run)


def in_float64(data):
    """Examples with values in float64."""
    return replace(data, x=data.x.double())


@contextmanager
def double_precision(run):
    """Context of a run in float64; new tensors are float64 too. Processors differ by rounding of float64 only."""
    torch.set_default_dtype(torch.float64)
    try:
        population = population_of(run)
        users = [replace(u, train=in_float64(u.train), test=in_float64(u.test)) for u in population.users]
        yield build_context_for(run, replace(population, users=tuple(users)))
    finally:
        torch.set_default_dtype(torch.float32)


def sampling_options(name):
    """Plan options that sample three clients per round; none for a centralized strategy."""
    return {} if strategies()[name].is_centralized else {"clients_per_round": 3}


def same(a, b):
    """Whether two states are identical, including names and dtypes."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def assert_statistics(state, path, mean, variance):
    """Compare the running statistics of a layer with a mean and a variance."""
    stored = state[f"{path}.running_mean"], state[f"{path}.running_var"]
    torch.testing.assert_close(stored, (mean.float(), variance.float()), rtol=1e-4, atol=1e-5)


def assert_engines_agree(run):
    """Check that the grid and the reference loop give identical outcomes; returns the latter's."""
    a, b = federate(run), execute(run, "grid")
    assert same(a.server.state, b.server.state)
    assert same(a.server.broadcast, b.server.broadcast)
    assert a.client_states.keys() == b.client_states.keys()
    assert all(same(a.client_states[u], b.client_states[u]) for u in a.client_states)
    assert a.scores == b.scores
    assert a.curve == b.curve
    return a
