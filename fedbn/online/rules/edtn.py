r"""Shallow layers follow the user, deep ones the source."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedbn.online.rules.base import Rule
from fedbn.online.statistics import Pair, Prior, State


@dataclass(frozen=True)
class EDTN(Rule):
    r"""Blend of batch and source in mean and *standard deviation*, layer by layer.

    The source weighs :math:`r_l = r_1 (r_L/r_1)^{(l-1)/(L-1)}` in layer l, from 0.1 in the first to 0.99 in the last.

    Wang, Wang, Xi, Zhang, Zhang, 2024, *Optimization-free test-time adaptation for cross-person activity recognition*
    (OFTTA), https://arxiv.org/abs/2310.18562

    Layers count in the order in which the model registers them. The paper's other half, a classifier of prototypes, is
    not here.

    Attributes:
        first, last: the source's weight at both ends.
    """

    name = "edtn"
    about = "blend with the user's rows in the same call, less and less towards the last layer"
    source = "Wang et al. 2024, arXiv:2310.18562"
    includes_current = True
    keeps = False

    first: float = 0.1
    last: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within("first", 1e-6, 1)
        self.within("last", 1e-6, 1)

    def gain(self, state: State, weight: Tensor) -> Tensor:
        return torch.ones_like(weight)

    def use(self, prior: Prior, state: State) -> Pair:
        r = self.first * (self.last / self.first) ** prior.depth()
        mean, var = state.moments
        return torch.lerp(mean, prior.mean, r), torch.lerp(var.sqrt(), prior.var.sqrt(), r) ** 2
