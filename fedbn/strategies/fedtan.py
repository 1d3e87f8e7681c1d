"""FedTAN: statistics and their gradients agreed on layer by layer (Wang, Shi, Chang, 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from fedbn.data.population import Examples
from fedbn.nn.conversion import replace_norms, require_statistics
from fedbn.norms.exchanged import Exchange, ExchangedNorm, exchanged_layers, speak
from fedbn.statistics.consensus import Aggregates
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import NormStrategy, Progress


@dataclass(frozen=True)
class FedTAN(NormStrategy):
    """The first local step of a round is a step of centralized training on all clients' first batches.

    https://arxiv.org/abs/2301.02982. A client says its batch mean, then its mean square about the common mean, layer
    after layer; backwards, its statistic gradients: 3L exchanges for L layers, and one of the model. Weights are the
    numbers of values (the released code's are uniform). The other steps are ordinary BN. Any model: what a pass meets.

    >>> FedTAN.syncs_first_batch
    True
    """

    name = "fedtan"
    about = "first step of a round by exact global statistics and statistic gradients, 3L+1 exchanges"
    source = "Wang et al. 2023"
    syncs_first_batch = True

    def prepare_model(self, model: nn.Module) -> nn.Module:
        require_statistics(model, f"strategy {self.name!r}")

        def make(_: str, old: nn.Module) -> nn.Module:
            bn = cast(nn.BatchNorm2d, old)
            return ExchangedNorm(bn.num_features, bn.eps, bn.momentum, bn.affine)

        return replace_norms(model, make)

    def sync_first_batch(self, model: nn.Module, batch: Examples, aggregates: Aggregates) -> dict[str, Moments] | None:
        model.train()
        said = speak(model, batch.x, batch.y, _told(model, aggregates))
        if said is None:
            return None
        n = next(v for k, v in said.items() if k.endswith("|n"))
        return {k: Moments.from_variance(n, v.cpu(), v.cpu() * 0) for k, v in said.items() if not k.endswith("|n")}

    def set_training_mode(self, model: nn.Module, progress: Progress, aggregates: Aggregates = ()) -> None:
        model.train()
        told = _told(model, aggregates) if aggregates else {}
        for path, layer in exchanged_layers(model).items():
            layer.exchange = told.get(path)


def _told(model: nn.Module, aggregates: Aggregates) -> dict[str, Exchange]:
    told = {path: Exchange() for path in exchanged_layers(model)}
    for answer in aggregates:
        for key, moments in answer.items():
            path, _, name = key.rpartition("|")
            setattr(told[path], name, moments.mean)
            told[path].total = float(moments.n)
    return told
