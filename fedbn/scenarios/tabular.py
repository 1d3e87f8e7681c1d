"""Tabular: scikit-learn's bundled tables, split into clients.

*breast-cancer* (Wolberg, Street, Mangasarian, 1995: 569 rows, 30 features, 2 classes), *wine* (Aeberhard, Forina,
1991: 178 rows, 13 features, 3 classes) and *digits* (Alpaydin, Kaynak, 1998: 1,797 rows, 64 pixels, 10 classes), all
of the UCI repository. The rows are real, who owns them is not: they are dealt along the first principal component, so
that neighboring clients hold alike rows (feature skew, and the label skew that comes with it), or at random.
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
    """Clients with the rows of one table; of each client's rows a random quarter tests.

    Features are centered and divided by their standard deviation over the whole table, labels not used: their units
    differ by a factor of up to 10,000, and plain SGD would see nothing but the largest.

    Attributes:
        unseen: clients that never train.
        table: ``breast-cancer``, ``wine`` or ``digits``.
        users: clients.
        dealt: ``component`` (sorted by the first principal component) or ``random``.
    """

    name: ClassVar[str] = "tabular"
    about: ClassVar[str] = "breast-cancer, wine or digits tables of scikit-learn, dealt to clients"
    model: ClassVar[str] = "mlp"
    plan: ClassVar[dict[str, object]] = {"rounds": 20, "local_epochs": 1, "batch_size": 16, "lr": 0.05, "momentum": 0.9}

    unseen: int = 2
    table: Literal["breast-cancer", "wine", "digits"] = "breast-cancer"
    users: int = 8
    dealt: Literal["component", "random"] = "component"

    def load(self, seed: int) -> Population:
        # Imported here because listing the scenarios should not cost scikit-learn's import.
        from sklearn import datasets

        bunch = getattr(datasets, LOADERS[self.table])()
        raw, labels = np.asarray(bunch.data, np.float64), np.asarray(bunch.target, np.int64)
        most = len(labels) // 8
        if not 2 <= self.users <= most:
            raise UserError(f"users={self.users}: choose 2 to {most}, {self.table} has {len(labels)} rows")
        spread = raw.std(0)
        rows = (raw - raw.mean(0)) / np.where(spread > 0, spread, 1.0)
        order = numpy_generator(0, "tabular", self.table).permutation(len(labels))
        if self.dealt == "component":
            _, _, axes = np.linalg.svd(rows, full_matrices=False)
            order = np.argsort(rows @ axes[0], kind="stable")
        users = []
        for i, mine in enumerate(np.array_split(order, self.users)):
            name = f"user{i + 1:02d}"
            mine = numpy_generator(0, "tabular", self.table, name).permutation(mine)
            cut = 3 * len(mine) // 4
            train, test = (
                Examples(
                    torch.from_numpy(rows[part].astype(np.float32)),
                    torch.from_numpy(labels[part]),
                    torch.full((len(part),), k),
                )
                for k, part in enumerate((mine[:cut], mine[cut:]))
            )
            users.append(User(name, self.table, train, test))
        made = (
            "alike rows together: made feature skew, with label skew" if self.dealt == "component" else "none: random"
        )
        return Population(
            users=tuple(users),
            unseen=hold_out(self.users, self.unseen, seed),
            classes=tuple(map(str, bunch.target_names)),
            skew=made,
            sources={f"sklearn/{LOADERS[self.table]}": hashlib.sha256(raw.tobytes()).hexdigest()},
        )
