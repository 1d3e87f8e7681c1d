"""EvalNorm: global BN with evaluation that corrects for small training batches (Singh, Shrivastava, ICCV 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedbn.strategies.base import LayerStrategy


@dataclass(frozen=True)
class EvalNormStrategy(LayerStrategy):
    """Train exactly like global BN; evaluate each sample as part of a batch of size M.

    https://arxiv.org/abs/1904.06031. The clients record the batch size M; it is averaged like statistics.

    Attributes:
        rule: weight of a sample in its statistics: ``1/M``, ``1/M^2`` or ``learned`` in training.

    >>> from torch import nn as torch_nn
    >>> net = torch_nn.Sequential(torch_nn.Linear(3, 4), torch_nn.BatchNorm1d(4))
    >>> EvalNormStrategy("1/M^2").prepare_model(net)[1].rule
    '1/M^2'
    """

    name = "evalnorm"
    title = "EvalNorm"
    about = "global BN; each test sample adjusts its own statistics; option rule"
    source = "Singh & Shrivastava 2019"
    kind = "evalnorm"
    rule: Literal["1/M", "1/M^2", "learned"] = "1/M"
