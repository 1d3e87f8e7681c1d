"""Remote: data that lie with the nodes of a deployment, each user's with that user's node alone.

The scenario says only what everybody has to agree on: how many users, shape and number of classes. Each node names its
user's file in its node config (``data="PATH"``); the server needs none. What is here in the place of data is noise of
that shape, which nobody trains on. As nobody has all users' test rows, the pooled row of the evaluation is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch

from fedbn.data.population import Examples, Population, User, hold_out
from fedbn.errors import UserError
from fedbn.scenarios.base import Scenario, scenario
from fedbn.scenarios.files import one_user
from fedbn.seeds import generator


@dataclass(frozen=True)
class Remote(Scenario):
    """Data at the nodes, e.g. ``remote:users=3:shape=6+128:classes=5``.

    Attributes:
        users: how many; node ``i`` serves user ``i``.
        unseen: users that never train.
        shape: of one example.
        classes: how many, numbered from 0 in every file.
        x: the array or column of values in each file, as in scenario ``files``.
        y: class numbers.
        test: share of a user's rows, the last, that test.
        gap: rows left out before the test rows.
    """

    name: ClassVar[str] = "remote"
    about: ClassVar[str] = "each node's own .npz, .csv or .parquet, in a deployment"
    model: ClassVar[str] = "mlp"

    users: int = 3
    unseen: int = 1
    shape: tuple[int, ...] = (16,)
    classes: int = 2
    x: str = "x"
    y: str = "y"
    test: float = 0.25
    gap: int = 1

    def load(self, seed: int) -> Population:
        if self.users < 1 or self.classes < 2 or not self.shape or min(self.shape) < 1:
            raise UserError("remote: at least 1 user, 2 classes and a shape such as 16 or 6+128 are needed")
        draw = generator(0, "stand-ins")
        labels = torch.arange(2 * self.classes) % self.classes

        def noise() -> Examples:
            return Examples(torch.randn(len(labels), *self.shape, generator=draw), labels, torch.zeros_like(labels))

        users = tuple(User(str(i), f"node {i}", noise(), noise()) for i in range(self.users))
        away = hold_out(self.users, self.unseen, seed)
        names = tuple(map(str, range(self.classes)))
        return Population(users, away, names, "whatever skew the nodes' data have", remote=True)


def own(text: str, path: str) -> User:
    """A node's user, from its file.

    Args:
        text: the scenario.
        path: the file.

    Raises:
        UserError: the file is not there or cannot be trained on.
    """
    about = cast(Remote, scenario(text))
    found = one_user(Path(path), about.classes, x=about.x, y=about.y, test=about.test, gap=about.gap)
    return User(found.name, found.domain, _shaped(found.train, about.shape), _shaped(found.test, about.shape))


def _shaped(data: Examples, shape: tuple[int, ...]) -> Examples:
    if data.x[0].numel() != torch.Size(shape).numel():
        return data
    return Examples(data.x.reshape(len(data), *shape), data.y, data.recording)
