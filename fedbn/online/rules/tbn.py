"""Statistics of the windows that are predicted, and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedbn.online.rules.base import Rule
from fedbn.online.statistics import State


@dataclass(frozen=True)
class TBN(Rule):
    """Prediction-time BN: :math:`a=1, r=0`, the batch inside its own statistics.

    Nado, Padhy, Sculley, D'Amour, Lakshminarayanan, Snoek, 2020, https://arxiv.org/abs/2006.10963

    The batch is the rows of *one user* in a call: with one window a call it is instance normalization, and other users'
    rows never count.
    """

    name = "tbn"
    about = "statistics of the user's rows in the same call (prediction-time BN)"
    source = "Nado et al. 2020, arXiv:2006.10963"
    includes_current = True
    keeps = False

    def gain(self, state: State, weight: Tensor) -> Tensor:
        return torch.ones_like(weight)
