"""Static BN: no running statistics in training, one pass before evaluation (Diao, Ding, Tarokh, ICLR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import State, statistics_layers
from fedbn.statistics.consensus import Aggregates, ConsensusStep
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import NormStrategy, Progress, Updates


@dataclass(frozen=True)
class StaticBN(NormStrategy):
    """HeteroFL's sBN: evaluation uses the mean of batch means and of batch variances over all clients' batches.

    https://arxiv.org/abs/2010.01264. A mean of batch variances lacks the variance between batches, which
    `global-recalibrated` includes.

    Attributes:
        batch: batch size of the pass.

    >>> StaticBN.syncs_statistics
    True
    """

    name = "static-bn"
    title = "Static BN"
    about = "batch statistics in training; clients' means for tests; option batch"
    source = "Diao et al. 2021"
    syncs_statistics = True
    batch: int = 32

    def aggregate_statistics(
        self, updates: Updates, weights: Sequence[float], keys: Sequence[str], old: State, progress: Progress
    ) -> State:
        return {k: old[k] for k in keys}

    def sync_statistics(self, model: nn.Module, x: Tensor) -> ConsensusStep:
        totals: dict[str, Moments] = {}

        def record(path: str, value: Tensor) -> None:
            batch = Moments.of(value)
            for name, entry in (("mean", batch.mean), ("var", batch.stored_variance())):
                key, value_moments = f"{path}|{name}", Moments.from_variance(1.0, entry, torch.zeros_like(entry))
                totals[key] = totals[key].merge(value_moments) if key in totals else value_moments

        layers = statistics_layers(model)
        model.eval()
        for layer in layers.values():
            layer.train()  # layers use batch statistics, while dropout stays off
        with torch.no_grad(), capture_inputs(layers, record):
            for rows in x.split(self.batch):
                if len(rows) > 1:
                    model(rows)
        yield totals

    def load_statistics(self, model: nn.Module, aggregates: Aggregates) -> None:
        layers = statistics_layers(model)
        for key, moments in aggregates[0].items():
            path, _, name = key.rpartition("|")
            getattr(layers[path], f"running_{name}").copy_(moments.mean)
