"""Remote: the data of each user are stored on that user's node only.

The scenario defines what all nodes have to agree on: number of users, shape and number of classes. Each node sets its
user's file in its node config (``data="PATH"``); the server needs no file. The population contains noise of that shape
as a placeholder, which is never used for training. The pooled row of the evaluation is left out, because no node has
the test rows of all users.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch

from fedbn.data.population import Examples, Population, User, hold_out
from fedbn.data.users import read_single_user
from fedbn.errors import UserError
from fedbn.scenarios.base import Scenario, scenario
from fedbn.seeds import generator


@dataclass(frozen=True)
class Remote(Scenario):
    """Data on the nodes, e.g. ``remote:users=3:shape=6+128:classes=5``.

    Attributes:
        users: number of users; node ``i`` serves user ``i``.
        unseen: number of users that never train.
        shape: shape of one example.
        classes: number of classes; they are numbered from 0 in every file.
        x: array or column of values in each file, as in scenario ``files``.
        y: column of class numbers.
        test: fraction of a user's rows for testing (the last rows).
        gap: number of rows dropped before the test rows.
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
        rng = generator(0, "stand-ins")
        labels = torch.arange(2 * self.classes) % self.classes

        def noise() -> Examples:
            return Examples(torch.randn(len(labels), *self.shape, generator=rng), labels, torch.zeros_like(labels))

        users = tuple(User(str(i), f"node {i}", noise(), noise()) for i in range(self.users))
        unseen = hold_out(self.users, self.unseen, seed)
        classes = tuple(map(str, range(self.classes)))
        return Population(users, unseen, classes, "natural differences between the data of the nodes", remote=True)


def load_node_user(text: str, path: str) -> User:
    """Load the user of a node from its file.

    Args:
        text: the scenario.
        path: the file.

    Raises:
        UserError: if the file does not exist or cannot be used for training.
    """
    options = cast(Remote, scenario(text))
    user = read_single_user(Path(path), options.classes, x=options.x, y=options.y, test=options.test, gap=options.gap)
    return User(user.name, user.domain, _reshape(user.train, options.shape), _reshape(user.test, options.shape))


def _reshape(data: Examples, shape: tuple[int, ...]) -> Examples:
    if data.x[0].numel() != torch.Size(shape).numel():
        return data
    return Examples(data.x.reshape(len(data), *shape), data.y, data.recording)
