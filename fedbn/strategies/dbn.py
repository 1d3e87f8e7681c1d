"""DBN: running statistics with a diminishing step size, at clients and server (Ma, Klabjan, 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fedbn.nn.roles import State
from fedbn.norms.dbn import diminished, next_epoch, schedule
from fedbn.strategies.base import LayerStrategy, Progress, Updates
from fedbn.strategies.global_pooled import GlobalPooled


@dataclass(frozen=True)
class DBN(LayerStrategy, GlobalPooled):
    r"""Server statistics :math:`\lambda_r=\alpha_r\,\mathrm{pooled}_r+(1-\alpha_r)\lambda_{r-1}`; layers alike.

    https://arxiv.org/abs/1705.08011. The paper trains on one machine; the server applies its update rule to rounds.

    Attributes:
        alpha: weight of new statistics: a number, ``1/m`` or ``1/m^h``, where m counts batches or rounds (see ``step``)
            in the layers and rounds at the server.
        mode: ``inference``: clients train with batch statistics; ``algorithm1``: with averaged statistics as constants.
        step: unit of m in the layers: ``iter`` (batches) or ``epoch`` (rounds).
        stat: average standard deviations, as in the paper, or variances.

    >>> import torch; from fedbn.strategies.base import Update
    >>> update = Update(0, {"bn.running_mean": torch.tensor([4.0]), "bn.running_var": torch.tensor([9.0])}, 1, 0.0)
    >>> old = {"bn.running_mean": torch.tensor([0.0]), "bn.running_var": torch.tensor([1.0])}
    >>> DBN("0.5").aggregate_statistics([update], [1], list(old), old, Progress(2, 2))
    {'bn.running_mean': tensor([2.]), 'bn.running_var': tensor([4.])}
    """

    name = "dbn"
    title = "Diminishing BN"
    about = "statistics with a diminishing step size; options alpha (0.25, 1/m, 1/m^2), mode, step, stat"
    source = "Ma & Klabjan 2017"
    kind = "dbn"
    alpha: str = "0.25"
    mode: Literal["inference", "algorithm1"] = "inference"
    step: Literal["iter", "epoch"] = "iter"
    stat: Literal["std", "var"] = "std"

    def set_training_mode(self, model: nn.Module, progress: Progress, aggregates: object = ()) -> None:
        model.train()
        next_epoch(model)

    def aggregate_statistics(
        self, updates: Updates, weights: Sequence[float], keys: Sequence[str], old: State, progress: Progress
    ) -> State:
        new = super().aggregate_statistics(updates, weights, keys, old, progress)
        alpha = schedule(self.alpha)(progress.round)
        for key in keys:
            if key.endswith("running_mean"):
                new[key] = old[key].lerp(new[key], alpha)
            elif key.endswith("running_var"):
                new[key] = diminished(old[key], new[key], alpha, self.stat)
        return new
