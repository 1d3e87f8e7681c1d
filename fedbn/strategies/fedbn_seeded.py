"""FedBN with an initial state for unseen users: the mean of the clients' BN entries."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.strategies.fedbn import FedBN
from fedbn.strategies.global_pooled import GlobalPooled
from fedbn.strategies.ownership import SEEDED


@dataclass(frozen=True)
class FedBNSeeded(FedBN, GlobalPooled):
    """FedBN for seen users; unseen users start from the clients' mean BN, as the authors advise.

    Li, Jiang, Zhang, Kamp, Dou, ICLR 2021, https://arxiv.org/abs/2102.07623

    Pooled variances include the variance of the means. Seen users get exactly the same models as with FedBN.

    >>> str(FedBNSeeded.statistics)
    'seeded'
    """

    name = "fedbn-seeded"
    title = "FedBN (seeded)"
    about = "FedBN; unseen users start from the mean of clients' BN; option norms"
    source = "Li et al. 2021"
    affine = SEEDED
    statistics = SEEDED
