"""FedNorm: one set of BN entries for each known group (Bernecker et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedbn.data.population import Population, User
from fedbn.errors import UserError
from fedbn.nn.roles import Role, State
from fedbn.statistics.moments import naive_mean
from fedbn.strategies.base import Progress, Updates
from fedbn.strategies.global_pooled import GlobalPooled
from fedbn.strategies.ownership import Ownership


@dataclass(frozen=True)
class FedNorm(GlobalPooled):
    """Statistics, scale and shift are averaged within groups, all other entries over all clients.

    https://arxiv.org/abs/2205.11096. A user's group is its known domain, such as a modality, a device or a body side.
    Unseen users get the entries of their group.

    >>> FedNorm().group_of(0, User("a", "left", None, None))
    'left'
    """

    name = "fednorm"
    title = "FedNorm"
    about = "one BN for each known group of users (their domain)"
    source = "Bernecker et al. 2022"

    def validate_population(self, population: Population) -> None:
        if len(population.users) > 1 and len({u.domain for u in population.users}) < 2:
            raise UserError(
                "fednorm needs users of known groups, but all users here belong to one group "
                f"({population.users[0].domain or 'unnamed'}): use scenario watch (left, right) or digits (domains), "
                "or strategy global-pooled"
            )

    def group_of(self, index: int, user: User) -> str:
        return user.domain

    def group_states(
        self, updates: Updates, weights: Sequence[float], table: Ownership, population: Population, known: State
    ) -> dict[str, State]:
        affine = [k for k in table.travels if table.roles[k] is Role.AFFINE]
        out: dict[str, State] = {}
        for group in dict.fromkeys(population.users[u.user].domain for u in updates):
            pairs = [(u, w) for u, w in zip(updates, weights, strict=True) if population.users[u.user].domain == group]
            members, shares = [u for u, _ in pairs], [w for _, w in pairs]
            out[group] = {k: naive_mean([u.state[k] for u in members], shares) for k in affine}
            out[group] |= self.aggregate_statistics(members, shares, table.shared_statistics, {}, Progress(1, 1))
        return out
