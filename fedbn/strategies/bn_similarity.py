"""Parameters weighted by a softmax over distances of BN statistics, after pFedBBN (2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.statistics.moments import Moments
from fedbn.strategies.similarity import SimilarityWeighted


@dataclass(frozen=True)
class BNSimilarity(SimilarityWeighted):
    r"""Weights :math:`\propto \exp(-D_{ij}/\tau)`.

    :math:`D_{ij}` is the mean over layers of :math:`\frac12(\|\Delta\mu\|+\|\Delta\sigma^2\|)`. Only the
    similarity of https://arxiv.org/abs/2511.18066 is implemented, without its class-balanced statistics at test time.

    Attributes:
        tau: temperature.

    >>> BNSimilarity(tau=1.0).weights(torch.tensor([0.0, 0.0]), 0).tolist()
    [0.5, 0.5]
    """

    name = "bn-similarity"
    title = "BN similarity"
    about = "FedBN; parameters weighted by similarity of statistics; option tau (weight exp(-distance / tau))"
    source = "after pFedBBN, 2025"
    tau: float = 1.0

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise UserError(f"bn-similarity: tau must be positive, not {self.tau:g}")

    def distance(self, a: dict[str, Moments], b: dict[str, Moments]) -> float:
        def layer_distance(path: str) -> float:
            means = (a[path].mean - b[path].mean).norm()
            return float(means + (a[path].variance() - b[path].variance()).norm()) / 2

        return sum(map(layer_distance, a)) / len(a)

    def weights(self, distances: Tensor, index: int) -> Tensor:
        return torch.softmax(-distances / self.tau, 0)
