r"""EDTN: batch statistics in shallow layers, source statistics in deep ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedbn.online.rules.base import BatchRule
from fedbn.online.statistics import Pair, Prior, State


@dataclass(frozen=True)
class EDTN(BatchRule):
    r"""Mixture of batch and source in mean and *standard deviation*, by layer.

    The source has weight :math:`r_l = r_1 (r_L/r_1)^{(l-1)/(L-1)}` in layer l: 0.1 in the first, 0.99 in the last.

    Wang, Wang, Xi, Zhang, Zhang, 2024, *Optimization-free test-time adaptation for cross-person activity recognition*
    (OFTTA), https://arxiv.org/abs/2310.18562

    Layers are numbered in registration order. The paper's second part, a prototype classifier, is not implemented.

    Attributes:
        first, last: weight of the source in the first and last layer.
    """

    name = "edtn"
    about = "mixture with the same call's rows, decreasing with depth"
    source = "Wang et al. 2024, arXiv:2310.18562"
    ranges = (("first", 1e-6, 1), ("last", 1e-6, 1))
    first: float = 0.1
    last: float = 0.99

    def use(self, prior: Prior, state: State) -> Pair:
        r = self.first * (self.last / self.first) ** prior.depth()
        mean, var = state.moments
        return torch.lerp(mean, prior.mean, r), torch.lerp(var.sqrt(), prior.var.sqrt(), r) ** 2
