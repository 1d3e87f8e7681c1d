"""Small populations for every task; each user has another offset, and targets follow the inputs."""

from __future__ import annotations

import numpy as np

from fedbn.data.population import Population
from fedbn.tasks import parse_task

ROWS = 24

MODELS = {
    "classification": "mlp",
    "multilabel": "mlp",
    "regression": "mlp",
    "segmentation": "tests.fedbn.tasks.networks:maps",
    "sequence": "tests.fedbn.tasks.networks:sequences",
}
"""A small model for each task."""


def arrays(task, users=3):
    """Arrays ``x``, ``y`` and ``user`` for a task."""
    draw = np.random.default_rng(0)
    user = np.repeat(np.arange(users), ROWS)
    if task in ("segmentation", "sequence"):
        positions = (6, 5) if task == "segmentation" else (8,)
        x = draw.normal(size=(users * ROWS, 2, *positions)).astype(np.float32)
        y = (x[:, 0] > x[:, 1]).astype(int) + (x[:, 0] > 1)
        y[:, :1] = -100
        return {"x": x + user.reshape(-1, *[1] * (x.ndim - 1)).astype(np.float32), "y": y, "user": user}
    x = draw.normal(size=(users * ROWS, 4)).astype(np.float32) + user[:, None].astype(np.float32)
    signal = x[:, :2] - user[:, None]
    y = {
        "classification": (signal[:, 0] > 0).astype(int),
        "regression": (40 + 10 * signal[:, 0]).astype(np.float32),
        "multilabel": (signal > 0).astype(int),
    }[task]
    return {"x": x, "y": y, "user": user}


def population(task):
    """A population for a task with as many users as scenario ``digits8`` has."""
    return Population.from_arrays(**arrays(task, users=10), task=parse_task(task))


def classification():
    return population("classification")


def multilabel():
    return population("multilabel")


def regression():
    return population("regression")


def segmentation():
    return population("segmentation")


def sequence():
    return population("sequence")
