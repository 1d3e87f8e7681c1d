"""Mini-batches of shuffled rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def batches(n: int, size: int, draw: torch.Generator) -> Iterator[Tensor]:
    """A shuffle of ``range(n)`` in batches of ``size``; a last batch of one joins the one before it.

    Batch normalization has nothing to normalize a single value by.

    >>> [len(b) for b in batches(9, 4, torch.Generator())]
    [4, 5]
    """
    yield from torch.randperm(n, generator=draw).split(sizes(n, size))


def sizes(n: int, size: int) -> list[int]:
    """Sizes of the batches of ``size`` that ``n`` rows are cut into.

    >>> sizes(9, 4), sizes(10, 4), sizes(1, 4)
    ([4, 5], [4, 4, 2], [1])
    """
    whole, rest = divmod(n, size)
    if rest == 1 and whole:
        return [size] * (whole - 1) + [size + 1]
    return [size] * whole + [rest] * (rest > 0)


def user_batches(owners: Tensor, size: int, draw: torch.Generator) -> Iterator[Tensor]:
    """As `batches`, each of one user's rows alone: a shuffle of every user's rows, and one of all batches.

    Args:
        owners: ``[n]`` whose each row is.
        size: of a batch.
        draw: of both shuffles.

    >>> owners = torch.tensor([0] * 4 + [1] * 3)
    >>> sorted(owners[rows].tolist() for rows in user_batches(owners, 2, torch.Generator()))
    [[0, 0], [0, 0], [1, 1, 1]]
    """
    cut: list[Tensor] = []
    for user in owners.unique().tolist():
        rows = (owners == user).nonzero()[:, 0]
        cut += [rows[part] for part in batches(len(rows), size, draw)]
    yield from (cut[i] for i in torch.randperm(len(cut), generator=draw).tolist())
