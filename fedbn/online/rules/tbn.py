"""Prediction-time BN: statistics of the current batch only."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.online.rules.base import BatchRule


@dataclass(frozen=True)
class TBN(BatchRule):
    """Prediction-time BN: :math:`a=1, r=0`, where the batch is part of its own statistics.

    Nado, Padhy, Sculley, D'Amour, Lakshminarayanan, Snoek, 2020, https://arxiv.org/abs/2006.10963

    The batch consists of the rows of *one user* in a call. With one window per call this is instance normalization.
    Rows of other users have no influence.
    """

    name = "tbn"
    about = "statistics of the rows in the same call (prediction-time)"
    source = "Nado et al. 2020, arXiv:2006.10963"
