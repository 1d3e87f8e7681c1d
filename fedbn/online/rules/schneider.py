r"""The source as pseudo-windows next to those of the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbn.online.rules.base import Rule
from fedbn.online.statistics import Pair, Prior, State, WindowStatistics, mix


@dataclass(frozen=True)
class Schneider(Rule):
    r""":math:`\mu = \frac{N}{N+n}\mu_0 + \frac{n}{N+n}\mu_B`, the same for the variance; nothing is remembered.

    Schneider, Rusak, Eck, Bringmann, Brendel, Bethge, 2020, https://arxiv.org/abs/2006.16971

    Attributes:
        N: windows that the source is worth.
    """

    name = "schneider"
    about = "blend of the source and the user's rows in the same call, N against n"
    source = "Schneider et al. 2020, arXiv:2006.16971"
    includes_current = True
    keeps = False

    N: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within("N", 0)

    def gain(self, state: State, weight: Tensor) -> Tensor:
        return torch.ones_like(weight)

    def update(self, prior: Prior, state: State, seen: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        after = super().update(prior, state, seen, weight, posterior)
        return replace(after, n=weight[:, None])

    def use(self, prior: Prior, state: State) -> Pair:
        n = state.n
        return mix(prior.moments, state.moments, n / (self.N + n).clamp_min(1e-12), between=False)
