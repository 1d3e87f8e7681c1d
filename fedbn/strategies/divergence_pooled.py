"""Statistics pooled with weights that decrease with divergence from the pool: a stand-in for FedDNA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedbn.nn.roles import State
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import Progress, Updates
from fedbn.strategies.global_pooled import GlobalPooled


@dataclass(frozen=True)
class DivergencePooled(GlobalPooled):
    r"""Pool statistics with weights :math:`w_k \exp(-d_k/\bar d)`, :math:`d_k` the W2 distance to the plain pool.

    FedDNA (Duan, Li, Lu, 2021, https://doi.org/10.1007/978-3-030-86486-6_44) computes importance weights with an
    adversarial autoencoder at the server; its code is not public. This strategy only keeps the idea that outlying
    statistics should count less.

    >>> DivergencePooled.name
    'divergence-pooled'
    """

    name = "divergence-pooled"
    title = "FedAvg (divergence-weighted BN)"
    about = "global BN; outlying statistics count less (cf. FedDNA)"
    source = "after Duan et al. 2021"

    def aggregate_statistics(
        self, updates: Updates, weights: Sequence[float], keys: Sequence[str], old: State, progress: Progress
    ) -> State:
        center = super().aggregate_statistics(updates, weights, keys, old, progress)
        distances = [_distance(u.state, center) for u in updates]
        scale = max(sum(distances) / len(distances), 1e-12)
        shares = [w * math.exp(-d / scale) for w, d in zip(weights, distances, strict=True)]
        return super().aggregate_statistics(updates, shares, keys, old, progress)


def _distance(state: State, center: State) -> float:
    means = [k for k in center if k.endswith("running_mean")]

    def moments(entries: State, key: str) -> Moments:
        return Moments.from_variance(1.0, entries[key].cpu(), entries[key.removesuffix("mean") + "var"].cpu())

    return sum(float(moments(state, k).w2(moments(center, k))) for k in means)
