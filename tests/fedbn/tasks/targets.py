"""Targets of every kind, from which each task takes those that fit it."""

from __future__ import annotations

import torch

from fedbn.plugins import build
from fedbn.tasks import tasks

CLASSES = ("a", "b", "c")
N = 8


def kinds():
    """Targets of ``N`` examples, by kind."""
    draw = torch.Generator().manual_seed(0)
    return {
        "class": torch.arange(N) % 3,
        "number": torch.randn(N, generator=draw),
        "numbers": torch.randn(N, 2, generator=draw),
        "labels": (torch.rand(N, 3, generator=draw) < 0.5).float(),
        "map": torch.randint(0, 3, (N, 4, 5), generator=draw),
        "sequence": torch.randint(0, 3, (N, 6), generator=draw),
    }


def example(name):
    """A task with default options, targets that fit it, and outputs."""
    task = build(tasks()[name], {}, name)
    y = next(y for y in kinds().values() if task.check(y, CLASSES) is None)
    task = task.fit(y, CLASSES)
    draw = torch.Generator().manual_seed(1)
    return task, torch.randn(N, *task.output_shape(y, CLASSES), generator=draw, dtype=torch.float64), y
