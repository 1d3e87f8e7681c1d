"""The ownership table: which entries of a model are shared, seeded or local."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Protocol

from torch import nn

from fedbn.nn.roles import Role, roles


class Owner(StrEnum):
    """Whose value of an entry counts.

    Attributes:
        SHARED: the server's, for everybody, every round.
        SEEDED: the client's own; it is also sent and averaged, so that newcomers start from the population.
        LOCAL: the client's own; it never travels. A newcomer starts from the model's initial value.
    """

    SHARED = "shared"
    SEEDED = "seeded"
    LOCAL = "local"


SHARED, SEEDED, LOCAL = Owner.SHARED, Owner.SEEDED, Owner.LOCAL


class HasOwners(Protocol):
    """Whatever says who owns each role."""

    def owners(self) -> dict[Role, Owner]:
        """Owner of every role."""
        ...


@dataclass(frozen=True)
class Ownership:
    """The table that says who owns each entry of a model under a strategy."""

    roles: dict[str, Role]
    owners: dict[Role, Owner]
    shapes: dict[str, tuple[int, ...]]
    sizes: dict[str, int]

    @staticmethod
    def of(model: nn.Module, strategy: HasOwners) -> Ownership:
        """Read the table off a prepared model."""
        state = model.state_dict()
        return Ownership(
            roles(model),
            strategy.owners(),
            {k: tuple(v.shape) for k, v in state.items()},
            {k: v.numel() * v.element_size() for k, v in state.items()},
        )

    def owner(self, key: str) -> Owner:
        """Owner of one entry."""
        return self.owners[self.roles[key]]

    def keys(self, *owners: Owner) -> list[str]:
        """Entries with any of these owners, in the model's order."""
        return [k for k in self.roles if self.owner(k) in owners]

    @cached_property
    def travels(self) -> list[str]:
        """Entries that go to the server and come back."""
        return self.keys(SHARED, SEEDED)

    @cached_property
    def retained(self) -> list[str]:
        """Entries of which each client keeps its own value."""
        return self.keys(SEEDED, LOCAL)

    @property
    def personal(self) -> bool:
        """Whether two clients can end up with different models (counters do not count)."""
        return any(self.roles[k] is not Role.COUNTER for k in self.retained)

    def rows(self) -> list[dict[str, Any]]:
        """One row a role that occurs: owner, entries, elements, bytes, bytes down and up per client and round.

        >>> from fedbn.strategies.silobn import SiloBN
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        >>> [(r["role"], r["owner"], r["bytes_up"]) for r in Ownership.of(net, SiloBN()).rows()]
        [('body', 'shared', 60), ('head', 'shared', 32), ('affine', 'shared', 24), ('statistics', 'local', 0), \
('counter', 'local', 0)]
        """
        out = []
        for role in Role:
            keys = [k for k in self.roles if self.roles[k] is role]
            if not keys:
                continue
            size = sum(self.sizes[k] for k in keys)
            moved = 0 if self.owners[role] is LOCAL else size
            out.append(
                {
                    "role": str(role),
                    "owner": str(self.owners[role]),
                    "entries": len(keys),
                    "elements": sum(_numel(self.shapes[k]) for k in keys),
                    "bytes": size,
                    "bytes_down": moved,
                    "bytes_up": moved,
                }
            )
        return out


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
