r"""Source statistics as pseudo-windows, mixed with the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fedbn.online.rules.base import INF, BatchRule
from fedbn.online.statistics import Pair, Prior, State, WindowStatistics, mix


@dataclass(frozen=True)
class Schneider(BatchRule):
    r""":math:`\mu = \frac{N}{N+n}\mu_0 + \frac{n}{N+n}\mu_B`, the same for the variance, without memory.

    The batch's variance is the unbiased one, as in the authors' code (https://github.com/bethgelab/robustness).

    Schneider, Rusak, Eck, Bringmann, Brendel, Bethge, 2020, https://arxiv.org/abs/2006.16971

    Attributes:
        N: weight of the source, in windows.
    """

    name = "schneider"
    about = "mixture of the source and the same call's rows, weights N, n"
    source = "Schneider et al. 2020, arXiv:2006.16971"
    ranges = (("N", 0, INF),)
    N: float = 16.0

    def update(self, prior: Prior, state: State, window: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        return replace(super().update(prior, state, window, weight, posterior), n=weight[:, None])

    def between(self) -> bool:
        return False

    def use(self, prior: Prior, state: State) -> Pair:
        n = state.n
        return mix(prior.moments, state.moments, n / (self.N + n).clamp_min(1e-12), between=False)
