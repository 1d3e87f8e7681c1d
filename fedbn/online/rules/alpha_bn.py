r"""Alpha-BN: fixed mixture of source and batch statistics."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.online.rules.base import BatchRule
from fedbn.online.statistics import Pair, Prior, State, mix


@dataclass(frozen=True)
class AlphaBN(BatchRule):
    r""":math:`\mu = (1-\alpha)\mu_0 + \alpha\mu_B`, the same for the variance, which is the batch's unbiased one.

    You, Li, Zhao, 2021, *Test-time batch statistics calibration for covariate shift*, https://arxiv.org/abs/2110.04065

    Attributes:
        alpha: weight of the batch.
    """

    name = "alpha-bn"
    about = "fixed mixture of the source and the user's rows in the same call"
    source = "You, Li, Zhao 2021, arXiv:2110.04065"
    ranges = (("alpha", 0, 1),)
    alpha: float = 0.1

    def between(self) -> bool:
        return False

    def use(self, prior: Prior, state: State) -> Pair:
        return mix(prior.moments, state.moments, state.n.new_tensor(self.alpha), between=False)
