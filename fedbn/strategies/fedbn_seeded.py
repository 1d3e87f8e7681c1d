"""FedBN that can serve newcomers: BN entries stay each client's own, and their mean is kept for the unseen."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.strategies.global_pooled import GlobalPooled
from fedbn.strategies.ownership import SEEDED


@dataclass(frozen=True)
class FedBNSeeded(GlobalPooled):
    """FedBN for those who train, the mean BN for those who do not; the authors' advice for unseen clients.

    Variances are pooled with the spread of the means. Seen users get exactly what FedBN gives them.

    >>> str(FedBNSeeded.statistics)
    'seeded'
    """

    name = "fedbn-seeded"
    about = "FedBN; an unseen user starts from the mean of the clients' BN"
    source = "Li et al. 2021"
    affine = SEEDED
    statistics = SEEDED
