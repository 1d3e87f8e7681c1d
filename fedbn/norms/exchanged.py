r"""BN with statistics and statistic gradients exchanged between clients for one step.

Wang, Shi, Chang, 2023 (FedTAN), https://arxiv.org/abs/2301.02982
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.nn.batchnorm import AnyBatchNorm, along
from fedbn.norms.statnorm import normalize, widened


class StopPass(Exception):
    """Raised to end a forward or backward pass as soon as a layer has a message to send."""


@dataclass
class Exchange:
    """Aggregates that one layer uses in its next step, and the message with its missing ones.

    Attributes:
        mean, var: aggregated statistics; the first missing one is computed, sent and ends the pass.
        g_mu, g_v: aggregated statistic gradients; if missing, they are computed, sent and end the pass.
        total: values per channel in the batches of all clients.
        message: values to send by name (``mean``, ``var``, ``g_mu``, ``g_v``), ``[C]`` each.
        n: values per channel in this client's batch.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    g_mu: Tensor | None = None
    g_v: Tensor | None = None
    total: float = 0.0
    message: dict[str, Tensor] | None = None
    n: int = 0

    def send(self, **values: Tensor) -> NoReturn:
        """Store a message and end the pass."""
        self.message = {k: v.detach() for k, v in values.items()}
        raise StopPass


class ExchangedNorm(AnyBatchNorm):
    """BatchNorm of ``[N, C, *positions]``, except for one step after ``exchange`` is set.

    That step normalizes by the aggregated mean and variance, propagates the aggregated statistic gradients, and updates
    the running statistics by the aggregated ones.
    """

    channelwise = True
    exchange: Exchange | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations ``[N, C, *positions]``."""
        exchange = self.exchange
        if exchange is None or not self.training:
            return super().forward(input)
        input = widened(input)
        axes = [0, *range(2, input.dim())]
        exchange.n = input.numel() // input.shape[1]
        if exchange.mean is None:
            exchange.send(mean=input.mean(axes))
        mean = exchange.mean.to(input)
        if exchange.var is None:
            exchange.send(var=((input - along(mean, input)) ** 2).mean(axes))

        def aggregated(g_mu: Tensor, g_v: Tensor) -> tuple[Tensor, Tensor]:
            if exchange.g_mu is None or exchange.g_v is None:
                exchange.send(g_mu=g_mu, g_v=g_v)
            return exchange.g_mu.to(g_mu), exchange.g_v.to(g_v)

        out = normalize(input, mean, exchange.var.to(input), self.eps, gradient_map=aggregated)
        if exchange.g_mu is not None:
            self._update(exchange.mean, exchange.var * (exchange.total / max(exchange.total - 1, 1)))
            self.exchange = None
        return out if self.weight is None else torch.addcmul(along(self.bias, out), out, along(self.weight, out))

    def _update(self, mean: Tensor, var: Tensor) -> None:
        """Update the running statistics in the same way as BatchNorm."""
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean), rate)
            self.running_var.lerp_(var.to(self.running_var), rate)


def exchanged_layers(model: nn.Module) -> dict[str, ExchangedNorm]:
    """Layers of this kind by path, in registration order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, ExchangedNorm)}


def next_message(model: nn.Module, x: Tensor, y: Tensor, exchanges: dict[str, Exchange]) -> dict[str, Tensor] | None:
    """Message of the next layer about a batch, given the aggregates so far; None when all layers are complete.

    Layers are visited in the order in which the pass runs them. Parameters and their gradients do not change.

    Args:
        model: in training mode.
        x: ``[N, *shape]``.
        y: ``[N]`` class indices.
        exchanges: exchange of every layer by path; the message goes to the first incomplete one.

    Returns:
        ``path|name`` -> ``[C]``, and ``path|n`` -> the number of values (0-d).
    """
    layers = exchanged_layers(model)
    for path, layer in layers.items():
        layer.exchange, exchanges[path].message = exchanges[path], None
    try:
        loss = F.cross_entropy(model(x), y)
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    except StopPass:
        path, exchange = next((p, e) for p, e in exchanges.items() if e.message is not None)
        message = {f"{path}|{name}": value for name, value in (exchange.message or {}).items()}
        return message | {f"{path}|n": torch.tensor(float(exchange.n))}
    finally:
        for layer in layers.values():
            layer.exchange = None
    return None
