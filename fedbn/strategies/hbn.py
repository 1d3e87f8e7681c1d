"""HBN: a learned mixture of global and batch statistics (Chen, Xu, Wu, Kittler, ICML 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedbn.data.population import Examples
from fedbn.nn.conversion import convert_norms
from fedbn.nn.roles import State
from fedbn.norms.hybrid import HybridNorm, hybrid_layers, measuring
from fedbn.statistics.consensus import Aggregates, ConsensusStep
from fedbn.statistics.recalibration import set_statistics
from fedbn.strategies.base import Progress, Updates
from fedbn.strategies.global_pooled import GlobalPooled
from fedbn.strategies.ownership import SEEDED


@dataclass(frozen=True)
class HBN(GlobalPooled):
    r"""Mixing weights are local; statistics are measured in a separate pass over the first 64 rows.

    https://arxiv.org/abs/2505.21877. As in the released code, the pass uses one unshuffled batch. With :math:`n_k` rows
    measured by client k, :math:`\mu=\sum_k n_k\mu_k/n` and :math:`\sigma^2=\sum_k n_k(\sigma_k^2+(\mu_k-\mu)^2)/(n-1)`.

    Attributes:
        rate: weight of a round's statistics in the server's. They are measured again before each evaluation.

    >>> HBN.rows, str(HBN.gate)
    (64, 'seeded')
    """

    name = "hbn"
    title = "Hybrid BN"
    about = "learned mixture of global and batch statistics (64 rows)"
    source = "Chen et al. 2025"
    gate = SEEDED
    syncs_statistics = True
    rows: ClassVar[int | None] = 64
    rate: float = 0.002

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return convert_norms(super().prepare_model(model), HybridNorm, self.name)

    def before_local_training(self, model: nn.Module, data: Examples, progress: Progress) -> State:
        self._pass(model, data.x)
        return {}

    def after_local_training(self, model: nn.Module) -> State:
        for layer in hybrid_layers(model).values():
            if layer.measured is not None:
                layer.running_mean.copy_(layer.measured.mean)
                layer.running_var.copy_(layer.measured.variance())
        return {}

    def aggregate_statistics(
        self, updates: Updates, weights: Sequence[float], keys: Sequence[str], old: State, progress: Progress
    ) -> State:
        measured = [min(u.examples, self.rows or u.examples) for u in updates]
        new = super().aggregate_statistics(updates, measured, keys, old, progress)
        factor = {"running_var": sum(measured) / max(sum(measured) - 1, 1)}
        return {k: old[k].lerp(new[k] * factor.get(k.rpartition(".")[2], 1), self.rate) for k in keys}

    def sync_statistics(self, model: nn.Module, x: Tensor) -> ConsensusStep:
        yield {path: layer.measured for path, layer in self._pass(model, x).items() if layer.measured is not None}

    def load_statistics(self, model: nn.Module, aggregates: Aggregates) -> None:
        for path, moments in aggregates[0].items():
            set_statistics(hybrid_layers(model)[path], moments)

    def _pass(self, model: nn.Module, x: Tensor) -> dict[str, HybridNorm]:
        with torch.no_grad(), measuring(model) as layers:
            for rows in x[: self.rows].split(64):
                model(rows)
        return layers
