"""Ghost BN in place of BN (Hoffer, Hubara, Soudry, NeurIPS 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.strategies.base import LayerStrategy


@dataclass(frozen=True)
class GhostBNStrategy(LayerStrategy):
    """Normalize parts of each batch separately; running statistics are shared. https://arxiv.org/abs/1705.08741

    Attributes:
        size: rows per part.

    >>> from torch import nn as torch_nn
    >>> net = torch_nn.Sequential(torch_nn.Linear(3, 4), torch_nn.BatchNorm1d(4))
    >>> GhostBNStrategy(size=4).prepare_model(net)[1].size
    4
    """

    name = "ghost-bn"
    title = "Ghost BN"
    about = "BN over parts of the batch; option size (rows per part)"
    source = "Hoffer et al. 2017"
    kind = "ghost-bn"
    size: int = 8
