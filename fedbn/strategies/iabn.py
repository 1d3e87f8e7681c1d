"""Instance-aware BN: each sample corrects the shared statistics (Gong et al., NeurIPS 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.strategies.base import LayerStrategy


@dataclass(frozen=True)
class IABNStrategy(LayerStrategy):
    """Train and evaluate with IABN, the normalization of NOTE; statistics are shared. https://arxiv.org/abs/2208.05117

    Attributes:
        k: number of standard errors by which a sample may differ without correction.

    >>> from torch import nn as torch_nn
    >>> IABNStrategy(k=2.0).prepare_model(torch_nn.Sequential(torch_nn.Conv1d(3, 4, 2), torch_nn.BatchNorm1d(4)))[1].k
    2.0
    """

    name = "iabn"
    title = "IABN"
    about = "instance-aware BN: samples correct the shared statistics; option k"
    source = "Gong et al. 2022"
    kind = "iabn"
    k: float = 4.0
