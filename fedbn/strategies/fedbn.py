"""FedBN: BN layers stay local, all other entries are averaged (Li, Jiang, Zhang, Kamp, Dou, ICLR 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedbn.nn.roles import Role
from fedbn.strategies.base import NormStrategy
from fedbn.strategies.ownership import LOCAL, Owner


@dataclass(frozen=True)
class FedBN(NormStrategy):
    """Scale, shift and statistics of BN layers stay at the client. https://arxiv.org/abs/2102.07623

    The paper does not define the BN entries of an unseen client; here they keep their initial values. `fedbn-seeded`
    implements the authors' advice, the mean of the clients' entries.

    Attributes:
        norms: layers that stay local: ``batch``, those with batch statistics; ``all``, also LayerNorm and others.

    >>> sorted(str(role) for role, owner in FedBN().owners().items() if owner is LOCAL)
    ['affine', 'counter', 'statistics']
    """

    name = "fedbn"
    title = "FedBN"
    about = "BN scale, shift and statistics stay local; option norms (all: LayerNorm and others too)"
    source = "Li et al. 2021"
    affine = LOCAL
    statistics = LOCAL
    norms: Literal["batch", "all"] = "batch"

    def owners(self) -> dict[Role, Owner]:
        table = super().owners()
        return table | {Role.SAMPLE_AFFINE: table[Role.AFFINE]} if self.norms == "all" else table
