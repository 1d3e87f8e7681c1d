"""MTFL: private BN patches, with all four choices of private entries (Mills, Hu, Min, IEEE TPDS 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedbn.nn.roles import Role
from fedbn.strategies.base import NormStrategy
from fedbn.strategies.ownership import LOCAL, SHARED, Owner


@dataclass(frozen=True)
class MTFL(NormStrategy):
    """Multi-task FL with private BN patches. https://arxiv.org/abs/2007.09236

    Attributes:
        private: ``yb`` scale and shift (local affine), ``us`` statistics (= SiloBN), ``usyb`` both (= FedBN),
            ``none`` neither (= FedAvg).

    >>> str(MTFL("yb").owners()[Role.AFFINE]), str(MTFL("yb").owners()[Role.STATISTICS])
    ('local', 'shared')
    """

    name = "mtfl"
    title = "MTFL"
    about = "scale and shift, statistics, or both stay local; option private (yb, us, usyb or none)"
    source = "Mills et al. 2021"
    private: Literal["yb", "us", "usyb", "none"] = "yb"

    def owners(self) -> dict[Role, Owner]:
        table = super().owners()
        table[Role.AFFINE] = LOCAL if "yb" in self.private else SHARED
        table[Role.STATISTICS] = LOCAL if "us" in self.private else SHARED
        return table
