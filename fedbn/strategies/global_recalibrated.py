"""Global BN with statistics re-measured layer by layer under the aggregated weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fedbn.nn.roles import statistics_layers
from fedbn.statistics.consensus import Aggregates, ConsensusStep
from fedbn.statistics.recalibration import agree_layerwise, set_statistics
from fedbn.strategies.base import NormStrategy


@dataclass(frozen=True)
class GlobalRecalibrated(NormStrategy):
    """Train as global BN; before each evaluation the clients measure the statistics again, layer by layer.

    Running averages belong to each client's drifted weights, not to the averaged weights. The extra pass computes the
    exact moments of all clients' data under the averaged weights: static BN of HeteroFL with pooled moments instead of
    a mean of batch variances. Diao, Ding, Tarokh, 2021, https://arxiv.org/abs/2010.01264
    One exchange of moments per BN layer.

    >>> GlobalRecalibrated.syncs_statistics
    True
    """

    name = "global-recalibrated"
    title = "FedAvg (recalibrated BN)"
    about = "one BN for all; statistics re-measured after averaging"
    source = "after Diao et al. 2021 (sBN)"
    syncs_statistics = True

    def sync_statistics(self, model: nn.Module, x: Tensor) -> ConsensusStep:
        return agree_layerwise(model, x)

    def load_statistics(self, model: nn.Module, aggregates: Aggregates) -> None:
        layers = statistics_layers(model)
        for aggregate in aggregates:
            for path, moments in aggregate.items():
                set_statistics(layers[path], moments)
