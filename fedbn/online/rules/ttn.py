r"""A learnt blend of source and batch, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.online.rules.base import Rule
from fedbn.online.statistics import Pair, Prior, State, mix


@dataclass(frozen=True)
class TTN(Rule):
    r"""Mixture of batch and source with weight :math:`\alpha_c` for the batch, spread between the means included.

    Lim, Kim, Choo, Choi, 2023, *TTN: a domain-shift aware batch normalization in test-time adaptation*, ICLR,
    https://arxiv.org/abs/2302.05155

    The weights come with the prior; `fedbn.online.ttn_alpha.learn_alpha` learns them from labeled source data.
    """

    name = "ttn"
    about = "blend with the user's rows in the same call, weights learnt for each channel"
    source = "Lim, Kim, Choo, Choi 2023, arXiv:2302.05155"
    includes_current = True
    wants = "alpha"
    keeps = False

    def gain(self, state: State, weight: Tensor) -> Tensor:
        return torch.ones_like(weight)

    def use(self, prior: Prior, state: State) -> Pair:
        if prior.alpha is None:
            raise UserError(
                "rule 'ttn' needs a weight for each channel: personalize(model, rule, "
                "prior=fedbn.online.ttn_alpha.learn_alpha(...)) with labeled source data"
            )
        return mix(prior.moments, state.moments, prior.alpha)
