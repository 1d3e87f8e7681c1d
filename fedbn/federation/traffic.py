"""What travels between the server and its clients besides the model's entries, counted in bytes of tensors.

Entries are counted role by role (`fedbn.strategies.ownership.Ownership.rows`). Conversations are not a matter of roles:
they are counted here as they are held, so that a method which asks its clients dozens of times a round is seen to do
so.
Messages of evaluation are not counted: they measure a method and are no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedbn.nn.roles import State
from fedbn.statistics.consensus import Aggregates, flatten
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import Update

MESSAGE = "message"
"""What stands for an owner in the rows of what is no entry: nobody keeps it."""

REPEATED = "repeated"
"""What a client hears again, since it keeps nothing between two messages: the model, and earlier answers."""


@dataclass
class Traffic:
    """Bytes by purpose, over all clients and rounds so far.

    Attributes:
        trained: how many times a client was trained.
        down: from the server to clients.
        up: from clients to the server.

    >>> import torch
    >>> traffic, said = Traffic(), {"bn": Moments.of(torch.ones(4, 2))}
    >>> traffic.talked("first-batch sync", 100, [], [said, said])  # each says a count, 2 means, 2 sums of squares
    >>> traffic.talked("first-batch sync", 100, [said], [None, None])
    >>> traffic.round([Update(u, {}, 4, 0.5) for u in (0, 1)], {}, [said])
    >>> [(row["role"], row["bytes_down"], row["bytes_up"]) for row in traffic.rows()]
    [('first-batch sync', 40, 40), ('repeated', 240, 0)]
    """

    trained: int = 0
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)

    def talked(
        self, purpose: str, model: int, answers: Aggregates, replies: Sequence[dict[str, Moments] | None]
    ) -> None:
        """Count one exchange of a conversation.

        Args:
            purpose: of the conversation.
            model: bytes of the model that goes with every question.
            answers: all that clients are told; the last is new to them.
            replies: what each client says.
        """
        clients = len(replies)
        _add(self.down, purpose, clients * sum(_heard(answers[-1:])))
        _add(self.down, REPEATED, clients * (model + sum(_heard(answers[:-1]))))
        _add(self.up, purpose, sum(_heard([reply for reply in replies if reply is not None])))

    def round(self, updates: Sequence[Update], broadcast: State, aggregates: Aggregates) -> None:
        """Count a round of training.

        Args:
            updates: what came back.
            broadcast: what all clients were told besides the model.
            aggregates: the answers of the round's conversation, which go with the model.
        """
        self.trained += len(updates)
        _add(self.down, "notes", len(updates) * _size(broadcast))
        _add(self.down, REPEATED, len(updates) * sum(_heard(aggregates)))
        _add(self.up, "notes", sum(_size(update.notes) for update in updates))

    def rows(self) -> list[dict[str, Any]]:
        """One row per purpose, as `fedbn.strategies.ownership.Ownership.rows`: rounded bytes per client and round."""
        purposes = [p for p in dict.fromkeys([*self.down, *self.up]) if self.down.get(p) or self.up.get(p)]
        return [
            {
                "role": purpose,
                "owner": MESSAGE,
                "entries": 0,
                "elements": 0,
                "bytes": 0,
                "bytes_down": round(self.down.get(purpose, 0) / max(self.trained, 1)),
                "bytes_up": round(self.up.get(purpose, 0) / max(self.trained, 1)),
            }
            for purpose in purposes
        ]


def _add(counts: dict[str, int], purpose: str, size: int) -> None:
    counts[purpose] = counts.get(purpose, 0) + size


def _heard(answers: Aggregates) -> list[int]:
    return [_size(flatten(answer)) for answer in answers]


def _size(state: State) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())
