"""FedPer: a personal head on a shared body (Arivazhagan, Aggarwal, Singh, Choudhary, 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.personalization.base import Personalization
from fedbn.strategies.ownership import LOCAL


@dataclass(frozen=True)
class FedPer(Personalization):
    """The classifier stays at the client and is trained with the body. https://arxiv.org/abs/1912.00818

    An unseen user has no head but the initial one: its figures are at chance, as the paper leaves it.

    >>> str(FedPer.head)
    'local'
    """

    name = "fedper"
    about = "the classifier stays local"
    source = "Arivazhagan et al. 2019"
    head = LOCAL
