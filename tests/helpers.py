"""Helpers shared by test modules."""

from __future__ import annotations

import torch

from fedbn.strategies.base import strategies


def few(name):
    """A plan's fields that let three clients train in a round; none for a strategy with one trainer."""
    return {} if strategies()[name].is_centralized else {"clients_per_round": 3}


def same(a, b):
    """Equal to the last bit, names and dtypes included."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
