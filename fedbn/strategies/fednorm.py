"""FedNorm: one set of BN entries for each known group (Bernecker et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedbn.data.population import Population, User
from fedbn.errors import UserError
from fedbn.nn.roles import Role, State
from fedbn.statistics.moments import naive_mean
from fedbn.strategies.base import Progress, Update
from fedbn.strategies.global_pooled import GlobalPooled
from fedbn.strategies.ownership import Ownership


@dataclass(frozen=True)
class FedNorm(GlobalPooled):
    """Statistics, scale and shift are averaged within a group - a modality, a device, a body side - the rest over all.

    https://arxiv.org/abs/2205.11096. A user's group is its domain, known beforehand; an unseen user gets its group's
    entries.

    >>> FedNorm().group_of(0, User("a", "left", None, None))
    'left'
    """

    name = "fednorm"
    about = "one BN for each known group of users (their domain)"
    source = "Bernecker et al. 2022"

    def validate_population(self, population: Population) -> None:
        if len(population.users) > 1 and len({u.domain for u in population.users}) < 2:
            raise UserError(
                "fednorm needs users of known groups, and all these are of one "
                f"({population.users[0].domain or 'unnamed'}): use watch (left, right), digits (domains), or "
                "global-pooled"
            )

    def group_of(self, index: int, user: User) -> str:
        return user.domain

    def group_states(
        self,
        updates: Sequence[Update],
        weights: Sequence[float],
        table: Ownership,
        population: Population,
        known: State,
    ) -> dict[str, State]:
        statistics = [k for k in table.travels if table.roles[k] is Role.STATISTICS]
        affine = [k for k in table.travels if table.roles[k] is Role.AFFINE]
        out: dict[str, State] = {}
        for group in dict.fromkeys(population.users[u.user].domain for u in updates):
            mine = [(u, w) for u, w in zip(updates, weights, strict=True) if population.users[u.user].domain == group]
            members, shares = [u for u, _ in mine], [w for _, w in mine]
            out[group] = {k: naive_mean([u.state[k] for u in members], shares) for k in affine}
            out[group] |= self.aggregate_statistics(members, shares, statistics, {}, Progress(1, 1))
        return out
