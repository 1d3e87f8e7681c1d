"""Bytes of tensors sent between server and clients besides the model's entries.

The model's entries are counted by role (`fedbn.strategies.ownership.Ownership.rows`). This module counts the other
messages as they are sent, such as the dozens of exchanges per round in which some methods synchronize statistics.
Messages of evaluation are not counted: they measure a method and are not part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedbn.nn.roles import State
from fedbn.statistics.consensus import Aggregates, flatten
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import StackedUpdates, Update

MESSAGE = "message"
"""Owner in the rows of `Traffic.rows`, which describe messages and not entries of the model."""

REPEATED = "repeated"
"""Purpose of data that is sent again because clients are stateless between messages: model and earlier aggregates."""


@dataclass
class Traffic:
    """Bytes by purpose, summed over all clients and rounds so far.

    Attributes:
        trained: number of local trainings, summed over clients and rounds.
        down: bytes from the server to clients.
        up: bytes from clients to the server.

    >>> import torch
    >>> traffic, moments = Traffic(), {"bn": Moments.of(torch.ones(4, 2))}  # a count, 2 means, 2 sums of squares
    >>> traffic.count_exchange("first-batch sync", 100, [], [moments, moments])
    >>> traffic.count_exchange("first-batch sync", 100, [moments], [None, None])
    >>> traffic.count_round([Update(u, {}, 4, 0.5) for u in (0, 1)], {}, [moments])
    >>> [(row["role"], row["bytes_down"], row["bytes_up"]) for row in traffic.rows()]
    [('first-batch sync', 40, 40), ('repeated', 240, 0)]
    """

    trained: int = 0
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)

    def count_exchange(
        self, purpose: str, model: int, aggregates: Aggregates, replies: Sequence[dict[str, Moments] | None]
    ) -> None:
        """Count one exchange of a synchronization.

        Args:
            purpose: name of the synchronization.
            model: bytes of the model, which is sent with every request.
            aggregates: all aggregates sent to the clients; only the last one is new to them.
            replies: reply of each client.
        """
        clients = len(replies)
        _add(self.down, purpose, clients * sum(_sizes(aggregates[-1:])))
        _add(self.down, REPEATED, clients * (model + sum(_sizes(aggregates[:-1]))))
        _add(self.up, purpose, sum(_sizes([reply for reply in replies if reply is not None])))

    def count_round(self, updates: Sequence[Update], broadcast: State, aggregates: Aggregates) -> None:
        """Count a round of training.

        Args:
            updates: updates of the clients.
            broadcast: tensors sent to all clients besides the model.
            aggregates: results of the round's first-batch synchronization, which are sent with the model.
        """
        self.trained += len(updates)
        _add(self.down, "notes", len(updates) * _size(broadcast))
        _add(self.down, REPEATED, len(updates) * sum(_sizes(aggregates)))
        noted = [] if isinstance(updates, StackedUpdates) else updates
        _add(self.up, "notes", sum(_size(update.notes) for update in noted))

    def count_sums(self, received: State, messages: Sequence[State]) -> None:
        """Count a round of labeled sums: the result of the round before, and the messages of all clients."""
        _add(self.down, "labeled sums", len(messages) * _size(received))
        _add(self.up, "labeled sums", sum(map(_size, messages)))

    def rows(self) -> list[dict[str, Any]]:
        """Rounded bytes per client and round, one row per purpose, in the format of `Ownership.rows`."""
        purposes = [p for p in dict.fromkeys([*self.down, *self.up]) if self.down.get(p) or self.up.get(p)]
        fixed, trained = {"owner": MESSAGE, "entries": 0, "elements": 0, "bytes": 0}, max(self.trained, 1)

        def row(purpose: str) -> dict[str, Any]:
            down, up = (round(counts.get(purpose, 0) / trained) for counts in (self.down, self.up))
            return {"role": purpose, **fixed, "bytes_down": down, "bytes_up": up}

        return [row(purpose) for purpose in purposes]


def _add(counts: dict[str, int], purpose: str, size: int) -> None:
    counts[purpose] = counts.get(purpose, 0) + size


def _sizes(messages: Sequence[dict[str, Moments]]) -> list[int]:
    return [_size(flatten(message)) for message in messages]


def _size(state: State) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())
