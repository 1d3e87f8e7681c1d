"""FedTAN: BN statistics and their gradients synchronized layer by layer (Wang, Shi, Chang, 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedbn.data.population import Examples
from fedbn.nn.conversion import convert_norms
from fedbn.norms.exchanged import Exchange, ExchangedNorm, exchanged_layers, next_message
from fedbn.statistics.consensus import Aggregates
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import NormStrategy, Progress


@dataclass(frozen=True)
class FedTAN(NormStrategy):
    """The first local step of a round equals a centralized step on the first batches of all clients.

    https://arxiv.org/abs/2301.02982. Layer by layer, clients send their batch mean, then their mean square about the
    common mean, and in the backward pass their statistic gradients: 3L exchanges for L layers, and one of the model.
    Weights are the numbers of values (uniform in the released code). All other steps are ordinary BN. Layers are
    synchronized in the order of the forward pass, so any model is supported.

    >>> FedTAN.syncs_first_batch
    True
    """

    name = "fedtan"
    title = "FedTAN"
    about = "exact global statistics in the first step of a round"
    needs_cross_entropy = True
    source = "Wang et al. 2023"
    syncs_first_batch = True

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return convert_norms(super().prepare_model(model), ExchangedNorm, self.name)

    def sync_first_batch(self, model: nn.Module, batch: Examples, aggregates: Aggregates) -> dict[str, Moments] | None:
        model.train()
        message = next_message(model, batch.x, batch.y, _exchanges(model, aggregates))
        if message is None:
            return None
        n = next(v for k, v in message.items() if k.endswith("|n"))
        return {k: Moments.from_variance(n, v.cpu(), v.cpu() * 0) for k, v in message.items() if not k.endswith("|n")}

    def set_training_mode(self, model: nn.Module, progress: Progress, aggregates: Aggregates = ()) -> None:
        model.train()
        exchanges = _exchanges(model, aggregates) if aggregates else {}
        for path, layer in exchanged_layers(model).items():
            layer.exchange = exchanges.get(path)


def _exchanges(model: nn.Module, aggregates: Aggregates) -> dict[str, Exchange]:
    """Global statistics and gradients received so far, by layer."""
    exchanges = {path: Exchange() for path in exchanged_layers(model)}
    for aggregate in aggregates:
        for key, moments in aggregate.items():
            path, _, name = key.rpartition("|")
            setattr(exchanges[path], name, moments.mean)
            exchanges[path].total = float(moments.n)
    return exchanges
