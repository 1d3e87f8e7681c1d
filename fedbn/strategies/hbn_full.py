"""HBN with a statistics pass over all rows of a client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedbn.strategies.hbn import HBN


@dataclass(frozen=True)
class HBNFull(HBN):
    """HBN as described in the paper; the released code uses one batch only. https://arxiv.org/abs/2505.21877

    >>> HBNFull.rows is None
    True
    """

    name = "hbn-full"
    title = "Hybrid BN (full pass)"
    about = "HBN with a statistics pass over all rows"
    rows: ClassVar[int | None] = None
