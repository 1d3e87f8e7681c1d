r"""Balanced BN: moments of each class, mixed with equal weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbn.online.rules.base import Rule
from fedbn.online.statistics import Pair, Prior, State, WindowStatistics, mix


@dataclass(frozen=True)
class Balanced(Rule):
    r"""Balanced BN: exponentially weighted moments of each pseudo-label, all classes with equal weights,

    .. math:: \mu = \tfrac1K\sum_k \mu_k,\qquad v = \tfrac1K\sum_k \big(v_k + (\mu_k-\mu)^2\big).

    Su, Xu, Jia, 2024, *Towards real-world test-time adaptation: tri-net self-training with balanced normalization*
    (TRIBE), AAAI, https://arxiv.org/abs/2309.14949

    The gain is :math:`\max(0.0005 K, 0.01)` as published. The mixture of classwise and global updates (gamma) is not
    implemented. Every class starts from the overall statistics of the source, which makes adaptation slow; see
    `class-mixture`.

    Attributes:
        rate: gain; 0: the published value.
    """

    name = "balanced"
    about = "moments of each pseudo-class, mixed equally (TRIBE)"
    source = "Su, Xu, Jia 2024, arXiv:2309.14949"
    classwise = True
    ranges = (("rate", 0, 1),)
    rate: float = 0.0

    def start(self, prior: Prior, classes: int) -> State:
        return self.state_at_prior(prior, classes, classes)

    def update(self, prior: Prior, state: State, window: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        classes = posterior.shape[1]
        one_hot = torch.nn.functional.one_hot(posterior.argmax(1), classes) * weight.clamp(max=1)[:, None]
        rate = (self.rate or max(0.0005 * classes, 0.01)) * one_hot
        new = window.mean[:, None], window.var[:, None]
        mean, var = mix((state.mean, state.var), new, rate[:, :, None])
        return replace(state, n=state.n + one_hot, mean=mean, var=var)

    def use(self, prior: Prior, state: State) -> Pair:
        shift = state.mean - prior.mean[:, None]
        mean = prior.mean + shift.mean(1)
        between = (state.mean - mean[:, None]) ** 2
        return mean, prior.var + (state.var - prior.var[:, None] + between).mean(1)
