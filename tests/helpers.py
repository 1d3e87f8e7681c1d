"""Helpers shared by test modules."""

from __future__ import annotations

from pathlib import Path

import torch

from fedbn.federation.loop import federate
from fedbn.federation.setup import build_context
from fedbn.strategies.base import strategies

ROOT = Path(__file__).parents[1]
"""Root of the repository."""


def federated(run):
    """Context and outcome of a run in the reference loop."""
    return build_context(run), federate(run)


def sampling_options(name):
    """Plan options that sample three clients per round; none for a centralized strategy."""
    return {} if strategies()[name].is_centralized else {"clients_per_round": 3}


def same(a, b):
    """Whether two states are identical, including names and dtypes."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
