"""Users, classes and splits of a population."""

from __future__ import annotations

from typing import Any

import torch

from fedbn.data.population import Examples, Population


def describe(population: Population) -> dict[str, Any]:
    """Shape, classes, users and notices of a population, as values for JSON.

    Args:
        population: users as loaded.

    Returns:
        ``shape``; ``classes`` (none if rows have no class) with index, name and numbers of rows; ``users`` with name,
        whether they are seen, and numbers of rows; and ``notices``.
    """
    count = len(population.classes) if population.users[0].train.has_classes else 0
    train, test = (
        sum((_counts(part, count) for part in parts if count), torch.zeros(count, dtype=torch.long)).tolist()
        for parts in ([u.train for u in population.users], [u.test for u in population.users])
    )
    return {
        "shape": list(population.shape),
        "classes": [
            {"class": i, "label": name, "training rows": train[i], "test rows": test[i]}
            for i, name in enumerate(population.classes[:count])
        ],
        "users": [
            {
                "user": user.name,
                "trains": "no" if i in population.unseen else "yes",
                "training rows": len(user.train),
                "test rows": len(user.test),
                "validation rows": 0 if user.validation is None else len(user.validation),
            }
            for i, user in enumerate(population.users)
        ],
        "notices": list(population.notices),
    }


def _counts(data: Examples, classes: int) -> torch.Tensor:
    return torch.bincount(data.y, minlength=classes)
