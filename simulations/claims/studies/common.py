"""What the studies share: small real data, batches, and a training loop short enough to be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.data.population import Examples
from fedbn.federation.metrics import Row
from fedbn.federation.server import Outcome
from fedbn.nn.inference import logits
from fedbn.scenarios.digits import Digits
from fedbn.seeds import generator, key

NUMERICS = 1
"""Version of the numbers of all studies; raise it when a change here changes results."""

DIGITS = "scikit-learn's 8x8 digits (1,797 images, a quarter of them, drawn by the seed, for testing)"


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long()


def digits(seed: int) -> tuple[Examples, Examples]:
    """Training and test images ``[n, 1, 8, 8]`` in 0 to 1, dealt by the seed."""
    x, y = _digits()
    order = torch.randperm(len(y), generator=generator(seed, "claims", "digits"))
    everything = Examples(x, y, torch.zeros_like(y))
    return everything.take(order[:1347]), everything.take(order[1347:])


DOMAINS = ("mnist", "optdigits", "mfeat", "pendigits", "fonts", "mnistm")
SIX = "digits in six domains (scenario digits), 743 training images each, averaged to 14x14 pixels"


@cache
def digit_domains() -> dict[str, tuple[Examples, Examples]]:
    """Training and test images ``[n, 3, 14, 14]`` in -1 to 1 of every domain; at most 500 test."""
    users = Digits(test=500).load(0).users
    return {u.name: (_smaller(u.train), _smaller(u.test)) for u in users}


def _smaller(data: Examples) -> Examples:
    return Examples(F.avg_pool2d(data.x, 2), data.y, data.recording)


@contextmanager
def seeded(seed: int, *purpose: object) -> Iterator[None]:
    """Torch's global generator set for one purpose, e.g. initial weights, and put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "claims", *purpose))
        yield


def shuffled(n: int, size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Batches of row indices over some epochs, drawn by the seed; all of one size, the rest of an epoch is left out.

    A last batch of three rows would decide the statistics of a layer that remembers only the last batch.
    """
    for epoch in range(epochs):
        yield from torch.randperm(n, generator=generator(seed, "claims", "shuffle", epoch))[: n - n % size].split(size)


def by_epoch(order: Sequence[Tensor], epochs: int) -> Iterator[Sequence[Tensor]]:
    """The batches of each epoch of what `shuffled` gave for so many epochs.

    >>> [len(part) for part in by_epoch(list(shuffled(10, 3, 2, seed=0)), 2)]
    [3, 3]
    """
    steps = len(order) // epochs
    for epoch in range(epochs):
        yield order[epoch * steps : (epoch + 1) * steps]


def single_label(y: Tensor, size: int, labels: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Badly built batches: the rows of each are drawn from only ``labels`` classes."""
    draw = generator(seed, "claims", "single label")
    rows = [(y == c).nonzero()[:, 0] for c in range(int(y.max()) + 1)]
    for _ in range(steps):
        pool = torch.cat([rows[c] for c in torch.randperm(len(rows), generator=draw)[:labels].tolist()])
        yield pool[torch.randint(len(pool), (size,), generator=draw)]


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
    """Minimize the cross-entropy, one step a batch of ``order``; ends early once the loss is not finite.

    Args:
        model: trained in place.
        data: rows to index.
        order: batches of row indices.
        optimizer: of the model's parameters.
        scheduler: stepped after every batch.
        clip: largest norm of the gradient.
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
    """Share right in evaluation mode; a diverged model is as wrong as its arg max."""
    return float((logits(model, data.x).argmax(1) == data.y).double().mean())


def mean_accuracy(outcome: Outcome, row: Row) -> float:
    """Mean over users of their accuracy in one row of the evaluation matrix, statistics as aggregated."""
    scores = [score for user in outcome.scores.values() for score in user]
    found = [score.accuracy for score in scores if (score.row, score.column) == (row, "aggregated")]
    return sum(found) / len(found)
