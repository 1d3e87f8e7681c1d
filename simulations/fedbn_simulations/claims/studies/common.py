"""Code shared by the studies: small real data sets, batches and a simple training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn import seeds
from fedbn.data.population import Examples
from fedbn.federation.metrics import Row
from fedbn.federation.server import Outcome
from fedbn.nn.inference import logits
from fedbn.scenarios.digits import Digits
from fedbn.seeds import generator

NUMERICS = 1
"""Numerics version of all studies; each study also has its own. Increase it if a change affects results."""

DIGITS = "scikit-learn's 8x8 digits (1,797 images, a random quarter of them for testing)"


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long()


def digits(seed: int) -> tuple[Examples, Examples]:
    """Training and test images ``[n, 1, 8, 8]`` in 0 to 1, split at random with the seed."""
    x, y = _digits()
    order = torch.randperm(len(y), generator=generator(seed, "claims", "digits"))
    data = Examples(x, y, torch.zeros_like(y))
    return data.take(order[:1347]), data.take(order[1347:])


DOMAINS = ("mnist", "optdigits", "mfeat", "pendigits", "fonts", "mnistm")
SIX_DOMAINS = "digits of six domains (scenario digits), 743 training images each, averaged to 14x14 pixels"


@cache
def digit_domains() -> dict[str, tuple[Examples, Examples]]:
    """Training images and at most 500 test images ``[n, 3, 14, 14]`` in -1 to 1 of every domain."""
    users = Digits(test=500).load(0).users
    return {u.name: (_downsample(u.train), _downsample(u.test)) for u in users}


def _downsample(data: Examples) -> Examples:
    return Examples(F.avg_pool2d(data.x, 2), data.y, data.recording)


def seeded(seed: int, *purpose: object) -> AbstractContextManager[None]:
    """Context in which PyTorch's global generator is seeded for one purpose, e.g. initial weights."""
    return seeds.seeded(seed, "claims", *purpose)


def shuffled(n: int, size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Shuffled batches of row indices over some epochs; incomplete batches at the end of an epoch are dropped.

    A last batch of three rows would determine the statistics of a layer that only stores the last batch.
    """
    for epoch in range(epochs):
        yield from torch.randperm(n, generator=generator(seed, "claims", "shuffle", epoch))[: n - n % size].split(size)


def by_epoch(order: Sequence[Tensor], epochs: int) -> Iterator[Sequence[Tensor]]:
    """Split the batches of `shuffled` by epoch.

    >>> [len(batches) for batches in by_epoch(list(shuffled(10, 3, 2, seed=0)), 2)]
    [3, 3]
    """
    steps = len(order) // epochs
    for epoch in range(epochs):
        yield order[epoch * steps : (epoch + 1) * steps]


def single_label(y: Tensor, size: int, labels: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Unbalanced batches: each is sampled from only ``labels`` classes."""
    rng = generator(seed, "claims", "single label")
    rows = [(y == c).nonzero()[:, 0] for c in range(int(y.max()) + 1)]
    for _ in range(steps):
        pool = torch.cat([rows[c] for c in torch.randperm(len(rows), generator=rng)[:labels].tolist()])
        yield pool[torch.randint(len(pool), (size,), generator=rng)]


def train(
    model: nn.Module,
    data: Examples,
    order: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    clip: float | None = None,
    on_step: Callable[[], None] | None = None,
) -> nn.Module:
    """Minimize the cross-entropy with one step per batch of ``order``; stop early if the loss is not finite.

    Args:
        model: model to train in place.
        data: training data.
        order: batches of row indices.
        optimizer: optimizer of the model's parameters.
        scheduler: learning rate scheduler, stepped after every batch.
        clip: maximum norm of the gradient.
        on_step: called after every step.
    """
    model.train()
    for rows in order:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.x[rows]), data.y[rows])
        if not torch.isfinite(loss):
            break
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if on_step is not None:
            on_step()
    return model


def accuracy(model: nn.Module, data: Examples) -> float:
    """Accuracy in evaluation mode; also defined for a diverged model."""
    return float((logits(model, data.x).argmax(1) == data.y).double().mean())


def mean_accuracy(outcome: Outcome, row: Row) -> float:
    """Mean accuracy over users in one row of the evaluation matrix, with statistics as aggregated."""
    scores = [score for user in outcome.scores.values() for score in user]
    accuracies = [score.metrics["accuracy"] for score in scores if (score.row, score.column) == (row, "aggregated")]
    return sum(accuracies) / len(accuracies)
