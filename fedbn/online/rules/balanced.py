r"""Moments of each class, so that how often a class comes does not matter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbn.online.rules.base import Rule
from fedbn.online.statistics import Pair, Prior, State, WindowStatistics, mix


@dataclass(frozen=True)
class Balanced(Rule):
    r"""Balanced BN: exponentially weighted moments for each pseudo-label, all classes mixed in equal parts,

    .. math:: \mu = \tfrac1K\sum_k \mu_k,\qquad v = \tfrac1K\sum_k \big(v_k + (\mu_k-\mu)^2\big).

    Su, Xu, Jia, 2024, *Towards real-world test-time adaptation: tri-net self-training with balanced normalization*
    (TRIBE), AAAI, https://arxiv.org/abs/2309.14949

    The gain is :math:`\max(0.0005 K, 0.01)` as published; its mix of classwise and global updates (gamma) is not here.
    Every class starts at the source's overall statistics, which makes it slow: see `class-mixture`.

    Attributes:
        rate: gain; 0: as published.
    """

    name = "balanced"
    about = "running moments of each pseudo-class, mixed in equal parts (TRIBE's Balanced BN)"
    source = "Su, Xu, Jia 2024, arXiv:2309.14949"
    classwise = True

    rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within("rate", 0, 1)

    def start(self, prior: Prior, classes: int) -> State:
        return self.parts_at(prior, classes, classes)

    def update(self, prior: Prior, state: State, seen: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        classes = posterior.shape[1]
        which = torch.nn.functional.one_hot(posterior.argmax(1), classes) * weight.clamp(max=1)[:, None]
        rate = (self.rate or max(0.0005 * classes, 0.01)) * which
        new = seen.mean[:, None], seen.var[:, None]
        mean, var = mix((state.mean, state.var), new, rate[:, :, None])
        return replace(state, n=state.n + which, mean=mean, var=var)

    def use(self, prior: Prior, state: State) -> Pair:
        moved = state.mean - prior.mean[:, None]
        mean = prior.mean + moved.mean(1)
        spread = (state.mean - mean[:, None]) ** 2
        return mean, prior.var + (state.var - prior.var[:, None] + spread).mean(1)
