r"""MemBN: joint moments of the last few windows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbn.online.rules.base import INF, Rule
from fedbn.online.statistics import Pair, Prior, State, WindowStatistics, mix


@dataclass(frozen=True)
class MemBN(Rule):
    r"""Joint moments of the last ``size`` updates, mixed with the source by :math:`r = n_0/(n_0+n)`.

    After Kang, Kim, Ok, Kwak, 2024, *MemBN: robust test-time adaptation via batch norm with statistics memory*,
    ECCV.

    The queue follows the paper. Its adaptive weight per layer and its reset after a change of domain are not
    implemented.

    Attributes:
        size: number of updates in the queue.
        n0: weight of the source, in windows.
    """

    name = "membn"
    about = "joint moments of the last few updates"
    source = "after Kang et al. 2024 (MemBN)"
    includes_current = True
    ranges = (("size", 1, INF), ("n0", 0, INF))
    size: int = 16
    n0: float = 16.0

    def start(self, prior: Prior, classes: int) -> State:
        return self.state_at_prior(prior, classes, self.size)

    def update(self, prior: Prior, state: State, window: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        oldest = torch.nn.functional.one_hot((state.t % self.size).long(), self.size) == 1
        return replace(
            state,
            n=torch.where(oldest, weight[:, None], state.n),
            mean=torch.where(oldest[:, :, None], window.mean[:, None], state.mean),
            var=torch.where(oldest[:, :, None], window.var[:, None], state.var),
        )

    def use(self, prior: Prior, state: State) -> Pair:
        n = state.n.sum(1, keepdim=True)
        share = (state.n / n.clamp_min(1e-12))[:, :, None]
        mean = (share * state.mean).sum(1)
        var = (share * (state.var + (state.mean - mean[:, None]) ** 2)).sum(1)
        return mix(prior.moments, (mean, var), torch.where(n > 0, n / (self.n0 + n).clamp_min(1e-12), 0.0))
