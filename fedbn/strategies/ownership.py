"""Ownership of a model's entries: shared, seeded or local."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Protocol

from torch import nn

from fedbn.nn.roles import Role, roles


class Owner(StrEnum):
    """Owner of an entry.

    Attributes:
        SHARED: the server's value is used by all clients in every round.
        SEEDED: each client retains its own value, which is also sent and averaged; new users start from the mean.
        LOCAL: each client retains its own value, which is never sent; new users start from the initial value.
    """

    SHARED = "shared"
    SEEDED = "seeded"
    LOCAL = "local"


SHARED, SEEDED, LOCAL = Owner.SHARED, Owner.SEEDED, Owner.LOCAL


class HasOwners(Protocol):
    """An object with an owner for each role: a strategy or a treatment."""

    def owners(self) -> dict[Role, Owner]:
        """Owner of each role."""
        ...


@dataclass(frozen=True)
class Ownership:
    """Ownership table of a model's entries under a strategy.

    Attributes:
        roles: role of each entry.
        owners: owner of each role.
        shapes: shape of each entry.
        sizes: size of each entry in bytes.
    """

    roles: dict[str, Role]
    owners: dict[Role, Owner]
    shapes: dict[str, tuple[int, ...]]
    sizes: dict[str, int]

    @staticmethod
    def of(model: nn.Module, strategy: HasOwners) -> Ownership:
        """Ownership table of a model that the strategy has prepared."""
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
        """Shared entries: sent to the server and received from it (`SHARED` and `SEEDED`)."""
        return self.keys(SHARED, SEEDED)

    @cached_property
    def shared_statistics(self) -> list[str]:
        """Shared entries that are statistics."""
        return [k for k in self.travels if self.roles[k] is Role.STATISTICS]

    @cached_property
    def shared_parameters(self) -> list[str]:
        """Shared entries that are not statistics."""
        return [k for k in self.travels if self.roles[k] is not Role.STATISTICS]

    @cached_property
    def retained(self) -> list[str]:
        """Retained entries: each client keeps its own value (`SEEDED` and `LOCAL`)."""
        return self.keys(SEEDED, LOCAL)

    @property
    def personal(self) -> bool:
        """Whether clients can end with different models, apart from counters."""
        return any(self.roles[k] is not Role.COUNTER for k in self.retained)

    def rows(self) -> list[dict[str, Any]]:
        """One row per role: owner, entries, elements, bytes, and bytes down and up per client and round.

        >>> from fedbn.strategies.silobn import SiloBN
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        >>> [(r["role"], r["owner"], r["bytes_up"]) for r in Ownership.of(net, SiloBN()).rows()]
        [('body', 'shared', 60), ('head', 'shared', 32), ('affine', 'shared', 24), ('statistics', 'local', 0), \
('counter', 'local', 0)]
        """
        out: list[dict[str, Any]] = []
        for role in Role:
            if keys := [k for k in self.roles if self.roles[k] is role]:
                owner, size = self.owners[role], sum(self.sizes[k] for k in keys)
                elements = sum(math.prod(self.shapes[k]) for k in keys)
                out.append({"role": str(role), "owner": str(owner), "entries": len(keys), "elements": elements})
                out[-1] |= {"bytes": size, **dict.fromkeys(("bytes_down", "bytes_up"), 0 if owner is LOCAL else size)}
        return out
