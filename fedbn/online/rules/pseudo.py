r"""Source statistics as pseudo-windows, gradually outweighed by the user's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedbn.online.rules.base import INF, Ranges, Rule
from fedbn.online.statistics import Prior, State, WindowStatistics


@dataclass(frozen=True)
class Pseudo(Rule):
    r"""Exact moments of about the last ``cap`` windows, merged with a source of weight :math:`n_0`:

    .. math:: a_t = 1/\min(n_t, cap),\qquad r_t = n_0/(n_0+n_t).

    Schneider, Rusak, Eck, Bringmann, Brendel, Bethge, 2020, https://arxiv.org/abs/2006.16971, made cumulative and
    exact (their mixture omits the variance between the two means).

    Beyond ``cap`` windows, earlier ones are discounted exponentially, while the source keeps its weight. If the prior
    has its own ``n0`` per channel, it is used instead.

    Attributes:
        n0: weight of the source, in windows.
        cap: number of windows after which earlier ones are discounted.

    >>> import torch; from fedbn.online import personalize
    >>> net = personalize(torch.nn.Sequential(torch.nn.BatchNorm1d(1, eps=0.0), torch.nn.Linear(1, 2)), Pseudo(n0=1.0))
    >>> _ = net(torch.tensor([[4.0]]), user="ann")
    >>> net.statistics("ann")["0"]
    (tensor([2.]), tensor([4.5000]))
    """

    name = "pseudo"
    about = "source with the weight of n0 windows, merged with the user's"
    source = "after Schneider et al. 2020, arXiv:2006.16971"
    ranges: ClassVar[Ranges] = (("n0", 0, INF), ("cap", 1, INF))
    n0: float = 16.0
    cap: float = 2000.0

    def pseudo_count(self, prior: Prior) -> Tensor:
        """Weight of the source in windows, ``[C]``."""
        return torch.full_like(prior.eps, self.n0) if prior.n0 is None else prior.n0

    def gain(self, state: State, weight: Tensor) -> Tensor:
        return weight / (state.n[:, 0] + weight)

    def prior_share(self, prior: Prior, state: State) -> Tensor:
        n0 = self.pseudo_count(prior)
        return torch.where(state.n > 0, n0 / (n0 + state.n).clamp_min(1e-12), 1.0)

    def update(self, prior: Prior, state: State, window: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        room = (self.cap - weight[:, None]).clamp_min(0)
        return super().update(prior, replace(state, n=torch.minimum(state.n, room)), window, weight, posterior)
