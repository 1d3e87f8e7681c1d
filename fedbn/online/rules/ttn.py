r"""TTN: learned mixture of source and batch statistics, by channel."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.errors import UserError
from fedbn.online.rules.base import BatchRule
from fedbn.online.statistics import Pair, Prior, State, mix


@dataclass(frozen=True)
class TTN(BatchRule):
    r"""Mixture of batch and source with weight :math:`\alpha_c` for the batch, with the variance between the means.

    Lim, Kim, Choo, Choi, 2023, *TTN: a domain-shift aware batch normalization in test-time adaptation*, ICLR,
    https://arxiv.org/abs/2302.05155

    The weights are part of the prior; `fedbn.online.ttn_alpha.learn_alpha` learns them from labeled source data.
    """

    name = "ttn"
    about = "mixture with the same call's rows, learned for each channel"
    source = "Lim, Kim, Choo, Choi 2023, arXiv:2302.05155"
    requires = "alpha"

    def use(self, prior: Prior, state: State) -> Pair:
        if prior.alpha is None:
            raise UserError(
                "rule 'ttn' needs a weight for each channel: personalize(model, rule, "
                "prior=fedbn.online.ttn_alpha.learn_alpha(...)) with labeled source data"
            )
        return mix(prior.moments, state.moments, prior.alpha)
