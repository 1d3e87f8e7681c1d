"""FedBN: batch normalization stays local, the rest is averaged (Li, Jiang, Zhang, Kamp, Dou, ICLR 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.strategies.base import NormStrategy
from fedbn.strategies.ownership import LOCAL


@dataclass(frozen=True)
class FedBN(NormStrategy):
    """Keep scale, shift and statistics of every BN layer at home. https://arxiv.org/abs/2102.07623

    The paper leaves open what an unseen client uses; here it starts from initial BN. For the authors' advice (the
    mean of the clients') see `fedbn-seeded`.

    >>> sorted(str(role) for role, owner in FedBN().owners().items() if owner is LOCAL)
    ['affine', 'counter', 'statistics']
    """

    name = "fedbn"
    about = "BN scale, shift and statistics stay local"
    source = "Li et al. 2021"
    affine = LOCAL
    statistics = LOCAL
