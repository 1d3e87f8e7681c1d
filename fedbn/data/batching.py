"""Mini-batches of shuffled rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def batches(n: int, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Shuffle ``range(n)`` and split it into batches; a last batch of one row joins the previous batch.

    Batch normalization cannot normalize a single value.

    >>> [len(b) for b in batches(9, 4, torch.Generator())]
    [4, 5]
    """
    yield from torch.randperm(n, generator=rng).split(batch_sizes(n, size))


def batch_sizes(n: int, size: int) -> list[int]:
    """Sizes of the batches when ``n`` rows are split into batches of ``size``.

    >>> batch_sizes(9, 4), batch_sizes(10, 4), batch_sizes(1, 4)
    ([4, 5], [4, 4, 2], [1])
    """
    whole, rest = divmod(n, size)
    if rest == 1 and whole:
        return [size] * (whole - 1) + [size + 1]
    return [size] * whole + [rest] * (rest > 0)


def user_batches(owners: Tensor, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Like `batches`, but each batch holds rows of one user only; rows and batches are both shuffled.

    Args:
        owners: user of each row, ``[n]``.
        size: batch size.
        rng: generator for both shuffles.

    >>> owners = torch.tensor([0] * 4 + [1] * 3)
    >>> sorted(owners[rows].tolist() for rows in user_batches(owners, 2, torch.Generator()))
    [[0, 0], [0, 0], [1, 1, 1]]
    """
    parts: list[Tensor] = []
    for user in owners.unique().tolist():
        rows = (owners == user).nonzero()[:, 0]
        parts += [rows[part] for part in batches(len(rows), size, rng)]
    yield from (parts[i] for i in torch.randperm(len(parts), generator=rng).tolist())
