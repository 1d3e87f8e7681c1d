"""Validation splits and the pooled test set."""

from __future__ import annotations

import torch

from fedbn.data.population import Examples, User
from fedbn.errors import UserError


def pooled_test(parts: list[Examples], rows: int, rng: torch.Generator) -> Examples:
    """Draw at most ``rows`` test rows without replacement, equally many from every part.

    If there are more parts than rows, draw ``rows`` parts and take one row from each.

    >>> part = Examples(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    >>> [len(pooled_test([part] * n, 4, torch.Generator())) for n in (2, 3, 9)]
    [4, 3, 4]
    """
    if rows < len(parts):
        parts = [parts[i] for i in torch.randperm(len(parts), generator=rng)[:rows].sort().values.tolist()]
    share = max(1, rows // len(parts))
    return Examples.concat([p.take(torch.randperm(len(p), generator=rng)[:share].sort().values) for p in parts])


def _held_out(rows: torch.Tensor, share: float) -> int:
    """Number of rows to hold out, 0 if none would remain for training."""
    n = int(len(rows) * share)
    return n if len(rows) > n + 1 else 0


def carve_validation(user: User, share: float = 0.2) -> User:
    """Split a user's training data in time: the last ``share`` of each recording and class becomes the test set.

    The row at the boundary is dropped, because neighboring windows overlap. Few rows of every class are split together,
    at one place. If the data set reserves examples for validation, these are used instead.

    Raises:
        UserError: if the user has too few examples.
    """
    if user.validation is not None:
        return User(user.name, user.domain, user.train, user.validation)
    data = user.train
    groups = [
        ((data.recording == recording) & (data.groups == group)).nonzero().flatten()
        for recording in data.recording.unique().tolist()
        for group in data.groups.unique().tolist()
    ]
    if all(_held_out(rows, share) == 0 for rows in groups):
        groups = [torch.arange(len(data))]  # few rows of every class: split all of them
    train_rows, test_rows = [], []
    for rows in groups:
        n = _held_out(rows, share)
        train_rows.append(rows[: len(rows) - n - 1] if n else rows)
        test_rows.append(rows[len(rows) - n :])
    if not any(map(len, test_rows)):
        raise UserError(
            f"user {user.name} has too few examples ({len(data)}) to hold any out for validation: tune with fewer "
            "clients in --partition, or set --lr yourself"
        )
    train, test = (data.subset(torch.cat(rows).sort().values) for rows in (train_rows, test_rows))
    return User(user.name, user.domain, train, test)
