"""HBN with a statistics pass over all of a client's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedbn.strategies.hbn import HBN


@dataclass(frozen=True)
class HBNFull(HBN):
    """As the method is described, where the released code stops after one batch. https://arxiv.org/abs/2505.21877

    >>> HBNFull.rows is None
    True
    """

    name = "hbn-full"
    about = "HBN whose statistics pass goes over all rows"
    source = "Chen et al. 2025"
    rows: ClassVar[int | None] = None
