"""Batch Renormalization in place of BN (Ioffe, NeurIPS 2017; in FL: Casella et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.strategies.base import LayerStrategy


@dataclass(frozen=True)
class BatchRenormStrategy(LayerStrategy):
    """Train with batch statistics that are corrected towards the shared running statistics.

    https://arxiv.org/abs/1702.03275, https://arxiv.org/abs/2303.10630

    Attributes:
        r_max: final limit of the scale correction.
        d_max: final limit of the shift correction.
        momentum: weight of a batch in the running statistics.
        start: batches of a client until the limits begin to grow. The paper uses 5,000, 40,000 and 25,000 for ImageNet;
            the defaults are smaller by a factor of 200, in the same proportions.
        r_full: batches until the scale limit is reached.
        d_full: batches until the shift limit is reached.

    >>> from torch import nn as torch_nn
    >>> net = torch_nn.Sequential(torch_nn.Linear(3, 4), torch_nn.BatchNorm1d(4))
    >>> BatchRenormStrategy(r_max=2.0).prepare_model(net)[1].limits(200)
    (2.0, 5.0)
    """

    name = "batch-renorm"
    title = "Batch Renorm"
    about = "BatchRenorm instead of BN; options r_max, d_max, momentum, start, r_full, d_full"
    source = "Ioffe 2017"
    kind = "batch-renorm"
    r_max: float = 3.0
    d_max: float = 5.0
    momentum: float = 0.1
    start: int = 25
    r_full: int = 200
    d_full: int = 125
