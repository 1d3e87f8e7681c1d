"""Tabular: scikit-learn's bundled tables, split into clients.

*breast-cancer* (Wolberg, Street, Mangasarian, 1995: 569 rows, 30 features, 2 classes), *wine* (Aeberhard, Forina, 1991:
178 rows, 13 features, 3 classes) and *digits* (Alpaydin, Kaynak, 1998: 1,797 rows, 64 pixels, 10 classes), all of the
UCI repository. The rows are real, but the clients are synthetic. Rows are sorted by the first principal component and
split into clients (feature skew, and the label skew that comes with it), or assigned at random.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from fedbn.data.population import Examples, Population, User, hold_out
from fedbn.errors import UserError
from fedbn.scenarios.base import Scenario
from fedbn.seeds import numpy_generator

LOADERS = {"breast-cancer": "load_breast_cancer", "wine": "load_wine", "digits": "load_digits"}


@dataclass(frozen=True)
class Tabular(Scenario):
    """Clients with the rows of one table; a random quarter of each client's rows is the test data.

    Features are standardized over the whole table, without labels. Their units differ by a factor of up to 10,000, so
    the largest features would dominate plain SGD.

    Attributes:
        unseen: number of clients that never train.
        table: ``breast-cancer``, ``wine`` or ``digits``.
        users: number of clients.
        dealt: ``component`` (sorted by the first principal component) or ``random``.
    """

    name: ClassVar[str] = "tabular"
    about: ClassVar[str] = "scikit-learn's breast-cancer, wine or digits, dealt to clients"
    model: ClassVar[str] = "mlp"
    plan: ClassVar[dict[str, object]] = {"rounds": 20, "local_epochs": 1, "batch_size": 16, "lr": 0.05, "momentum": 0.9}

    unseen: int = 2
    table: Literal["breast-cancer", "wine", "digits"] = "breast-cancer"
    users: int = 8
    dealt: Literal["component", "random"] = "component"

    def load(self, seed: int) -> Population:
        # Imported here so that listing the scenarios does not import scikit-learn.
        from sklearn import datasets

        bunch = getattr(datasets, LOADERS[self.table])()
        raw, labels = np.asarray(bunch.data, np.float64), np.asarray(bunch.target, np.int64)
        limit = len(labels) // 8
        if not 2 <= self.users <= limit:
            raise UserError(f"users={self.users}: choose 2 to {limit}, {self.table} has {len(labels)} rows")
        std = raw.std(0)
        rows = (raw - raw.mean(0)) / np.where(std > 0, std, 1.0)
        x, y = torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(labels)
        order = numpy_generator(0, "tabular", self.table).permutation(len(labels))
        if self.dealt == "component":
            _, _, axes = np.linalg.svd(rows, full_matrices=False)
            order = np.argsort(rows @ axes[0], kind="stable")
        users = []
        for i, index in enumerate(np.array_split(order, self.users)):
            name = f"user{i + 1:02d}"
            index = numpy_generator(0, "tabular", self.table, name).permutation(index)
            cut = 3 * len(index) // 4
            train, test = (
                Examples(x[part], y[part], torch.full((len(part),), k))
                for k, part in enumerate((index[:cut], index[cut:]))
            )
            users.append(User(name, self.table, train, test))
        skew = "synthetic feature skew, with label skew" if self.dealt == "component" else "none: random"
        return Population(
            users=tuple(users),
            unseen=hold_out(self.users, self.unseen, seed),
            classes=tuple(map(str, bunch.target_names)),
            skew=skew,
            sources={f"sklearn/{LOADERS[self.table]}": hashlib.sha256(raw.tobytes()).hexdigest()},
        )
