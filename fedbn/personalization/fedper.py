"""FedPer: a personal head on a shared body (Arivazhagan, Aggarwal, Singh, Choudhary, 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.personalization.base import Personalization
from fedbn.strategies.ownership import LOCAL


@dataclass(frozen=True)
class FedPer(Personalization):
    """The classifier is local and trained together with the body. https://arxiv.org/abs/1912.00818

    An unseen user has only the initial head and thus chance accuracy, as in the paper.

    >>> str(FedPer.head)
    'local'
    """

    name = "fedper"
    title = "FedPer"
    about = "the classifier stays local"
    source = "Arivazhagan et al. 2019"
    head = LOCAL
