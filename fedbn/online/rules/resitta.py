r"""A running average on a leash."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbn.online.rules.base import Rule
from fedbn.online.statistics import Prior, State, WindowStatistics


@dataclass(frozen=True)
class ResiTTA(Rule):
    r"""After every step of a running average, statistics are drawn back to the source.

    Mean and standard deviation move by :math:`2\lambda` of their distance.

    Zhou, Tian, Xia et al., 2025, *Resilient practical test-time adaptation: soft batch normalization alignment and
    entropy-driven memory bank*, ICASSP, https://arxiv.org/abs/2401.14619

    The statistics only; the paper's memory of samples and its training are not here.

    Attributes:
        rate: gain of the average.
        leash: lambda; its default is ours.
    """

    name = "resitta"
    about = "running average that is drawn back to the source after each step"
    source = "Zhou et al. 2025, arXiv:2401.14619"

    rate: float = 0.05
    leash: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within("rate", 0, 1)
        self.within("leash", 0, 0.5)

    def gain(self, state: State, weight: Tensor) -> Tensor:
        return self.rate * weight.clamp(max=1)

    def between(self) -> bool:
        return False

    def update(self, prior: Prior, state: State, seen: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        after = super().update(prior, state, seen, weight, posterior)
        back = after.n.new_tensor(2 * self.leash)
        mean = torch.lerp(after.mean, prior.mean[:, None], back)
        std = torch.lerp(after.var.sqrt(), prior.var.sqrt()[:, None], back)
        return replace(after, mean=mean, var=std**2)
