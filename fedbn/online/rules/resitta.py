r"""ResiTTA: running average that is pulled back to the source."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbn.online.rules.base import RunningAverage, TrainPass
from fedbn.online.statistics import Prior, State, WindowStatistics


@dataclass(frozen=True)
class ResiTTA(RunningAverage, TrainPass):
    r"""After every step of a running average, the statistics are pulled back to the source.

    Mean and standard deviation move by a fraction :math:`2\lambda` of their distance.

    Zhou, Tian, Xia et al., 2025, *Resilient practical test-time adaptation: soft batch normalization alignment and
    entropy-driven memory bank*, ICASSP, https://arxiv.org/abs/2401.14619

    Only the statistics are implemented, not the paper's memory of samples and its training.

    Attributes:
        rate: gain of the average.
        leash: lambda; the default is ours.
    """

    name = "resitta"
    about = "running average, pulled back to the source after each step"
    source = "Zhou et al. 2025, arXiv:2401.14619"
    ranges = (("leash", 0, 0.5),)
    rate: float = 0.05
    leash: float = 0.01

    def between(self) -> bool:
        return False

    def update(self, prior: Prior, state: State, window: WindowStatistics, weight: Tensor, posterior: Tensor) -> State:
        after = super().update(prior, state, window, weight, posterior)
        step = after.n.new_tensor(2 * self.leash)
        mean = torch.lerp(after.mean, prior.mean[:, None], step)
        std = torch.lerp(after.var.sqrt(), prior.var.sqrt()[:, None], step)
        return replace(after, mean=mean, var=std**2)
