"""LG-FedAvg: local representations, a shared head (Liang, Liu, Ziyin, Allen, Brent, Salakhutdinov, Morency, 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.personalization.base import Personalization
from fedbn.strategies.ownership import LOCAL


@dataclass(frozen=True)
class LGFedAvg(Personalization):
    """The body is local; only the classifier is averaged. https://arxiv.org/abs/2001.01523

    The strategy sets the owners of normalization layers: with ``fedbn`` the whole representation is local, as in the
    paper. Unseen users have no model.

    >>> str(LGFedAvg.body)
    'local'
    """

    name = "lg-fedavg"
    title = "LG-FedAvg"
    about = "the body stays local, the classifier is shared"
    source = "Liang et al. 2020"
    body = LOCAL
