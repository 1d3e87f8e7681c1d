"""Validation splits and the pooled test set."""

from __future__ import annotations

import torch

from fedbn.data.population import Examples, User
from fedbn.errors import UserError


def pooled_test(parts: list[Examples], rows: int, draw: torch.Generator) -> Examples:
    """At most ``rows`` test rows, drawn without replacement: an equal share from every part.

    Where there are more parts than rows, one row each from as many parts, which are drawn too.

    >>> part = Examples(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    >>> [len(pooled_test([part] * n, 4, torch.Generator())) for n in (2, 3, 9)]
    [4, 3, 4]
    """
    if rows < len(parts):
        parts = [parts[i] for i in torch.randperm(len(parts), generator=draw)[:rows].sort().values.tolist()]
    share = max(1, rows // len(parts))
    return Examples.concat([p.take(torch.randperm(len(p), generator=draw)[:share].sort().values) for p in parts])


def carve_validation(user: User, share: float = 0.2) -> User:
    """Split a user's training recordings in time: of each (recording, class) the last ``share`` tests.

    Neighboring windows overlap, so the row at the boundary is dropped: it belongs to neither side.
    """
    data = user.train
    train_rows, test_rows = [], []
    for recording in data.recording.unique().tolist():
        for label in data.y.unique().tolist():
            rows = ((data.recording == recording) & (data.y == label)).nonzero().flatten()
            n = int(len(rows) * share)
            if n < 1 or len(rows) - n - 1 < 1:
                train_rows.append(rows)
                continue
            train_rows.append(rows[: len(rows) - n - 1])
            test_rows.append(rows[len(rows) - n :])
    if not test_rows:
        raise UserError(
            f"user {user.name} has too few examples ({len(data)}) to hold any out for validation: tune with fewer "
            "clients in --partition, or set --lr yourself"
        )
    return User(
        user.name,
        user.domain,
        data.take(torch.cat(train_rows).sort().values),
        data.take(torch.cat(test_rows).sort().values),
    )
