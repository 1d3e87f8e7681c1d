"""Ownership of a model's entries: shared, seeded or local."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Protocol

from torch import nn
from torch.nn.parameter import is_lazy

from fedbn.nn.roles import Role, is_below, require_paths, roles


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


PRIVATE = "private"
"""Name of the row of `Ownership.rows` for private layers."""

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
        private: entries that are local whatever their role.
    """

    roles: dict[str, Role]
    owners: dict[Role, Owner]
    shapes: dict[str, tuple[int, ...]]
    sizes: dict[str, int]
    private: frozenset[str] = frozenset()

    @staticmethod
    def of(model: nn.Module, strategy: HasOwners, private: Iterable[str] = ()) -> Ownership:
        """Ownership table of a model that the strategy has prepared.

        Args:
            model: may have lazy layers, whose entries count as 0 bytes.
            strategy: defines the owner of each role.
            private: paths of layers that are local whatever their roles.

        Raises:
            UserError: a path that matches no entry.
        """
        paths = tuple(private)
        require_paths(model, paths, "private")
        state = model.state_dict(keep_vars=True)
        return Ownership(
            roles(model),
            strategy.owners(),
            {k: () if is_lazy(v) else tuple(v.shape) for k, v in state.items()},
            {k: 0 if is_lazy(v) else v.numel() * v.element_size() for k, v in state.items()},
            frozenset(k for k, role in roles(model).items() if role is not Role.COUNTER and is_below(k, paths)),
        )

    def owner(self, key: str) -> Owner:
        """Owner of one entry."""
        return LOCAL if key in self.private else self.owners[self.roles[key]]

    def shares(self, role: Role) -> bool:
        """Whether the server's values of all entries with a role are used by all clients."""
        return all(self.owner(k) is SHARED for k in self.roles if self.roles[k] is role)

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
        """One row per role, and one for private layers: owner, entries, elements, bytes; bytes per client and round.

        >>> from fedbn.strategies.silobn import SiloBN
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        >>> [(r["role"], r["owner"], r["bytes_up"]) for r in Ownership.of(net, SiloBN()).rows()]
        [('body', 'shared', 60), ('head', 'shared', 32), ('affine', 'shared', 24), ('statistics', 'local', 0), \
('counter', 'local', 0)]
        """
        out: list[dict[str, Any]] = []
        own = {k: r for k, r in self.roles.items() if k not in self.private}
        groups = {str(role): [k for k, r in own.items() if r is role] for role in Role}
        for role, keys in (groups | {PRIVATE: [k for k in self.roles if k in self.private]}).items():
            if keys:
                owner, size = self.owner(keys[0]), sum(self.sizes[k] for k in keys)
                elements = sum(math.prod(self.shapes[k]) for k in keys)
                out.append({"role": role, "owner": str(owner), "entries": len(keys), "elements": elements})
                out[-1] |= {"bytes": size, **dict.fromkeys(("bytes_down", "bytes_up"), 0 if owner is LOCAL else size)}
        return out
