r"""BN whose statistics and statistic gradients are agreed on with other clients, for one step.

Wang, Shi, Chang, 2023 (FedTAN), https://arxiv.org/abs/2301.02982
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fedbn.norms.statnorm import along, normalize, widened


class Stop(Exception):
    """Raised in a pass as soon as the layer that has something to say has said it."""


@dataclass
class Exchange:
    """What one layer is told for its next step, and what it says.

    Attributes:
        mean, var: agreed statistics; the first that is missing is said and stops the pass.
        g_mu, g_v: agreed statistic gradients; if missing they are said and stop the pass.
        total: values a channel has in all clients' batches.
        said: by name (``mean``, ``var``, ``g_mu``, ``g_v``), ``[C]`` each.
        n: values a channel has in this client's batch.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    g_mu: Tensor | None = None
    g_v: Tensor | None = None
    total: float = 0.0
    said: dict[str, Tensor] | None = None
    n: int = 0

    def say(self, **values: Tensor) -> NoReturn:
        """Leave a message and end the pass."""
        self.said = {k: v.detach() for k, v in values.items()}
        raise Stop


class ExchangedNorm(_BatchNorm):
    """BatchNorm, but for the one step for which it holds an `Exchange`.

    That step normalizes by the agreed mean and variance, sends the agreed statistic gradients back, and moves the
    running statistics by the agreed ones. Without an exchange it is BatchNorm.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        self.exchange: Exchange | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations ``[N, C, *positions]``."""
        told = self.exchange
        if told is None or not self.training:
            return super().forward(input)
        input = widened(input)
        axes = [0, *range(2, input.dim())]
        told.n = input.numel() // input.shape[1]
        if told.mean is None:
            told.say(mean=input.mean(axes))
        mean = told.mean.to(input)
        if told.var is None:
            told.say(var=((input - along(mean, input)) ** 2).mean(axes))

        def agreed(g_mu: Tensor, g_v: Tensor) -> tuple[Tensor, Tensor]:
            if told.g_mu is None or told.g_v is None:
                told.say(g_mu=g_mu, g_v=g_v)
            return told.g_mu.to(g_mu), told.g_v.to(g_v)

        out = normalize(input, mean, told.var.to(input), self.eps, exchange=agreed)
        if told.g_mu is not None:
            self._move(told.mean, told.var * (told.total / max(told.total - 1, 1)))
            self.exchange = None
        return out if self.weight is None else torch.addcmul(along(self.bias, out), out, along(self.weight, out))

    def _move(self, mean: Tensor, var: Tensor) -> None:
        """One step of the running statistics, as BatchNorm would make it."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean), rate)
            self.running_var.lerp_(var.to(self.running_var), rate)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of position axes."""


def exchanged_layers(model: nn.Module) -> dict[str, ExchangedNorm]:
    """Path -> layer, in registration order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, ExchangedNorm)}


def speak(model: nn.Module, x: Tensor, y: Tensor, told: dict[str, Exchange]) -> dict[str, Tensor] | None:
    """What the next layer says about a batch, given what all layers have been told; None when all is told.

    Layers are taken in the order in which the pass meets them; parameters and their gradients stay as they were.

    Args:
        model: in training mode.
        x: ``[N, *shape]``.
        y: ``[N]`` class indices.
        told: exchange of every layer by path; incomplete ones are filled by what is said next.

    Returns:
        ``path|name`` -> ``[C]``, and ``path|n`` -> the number of values (0-d).
    """
    layers = exchanged_layers(model)
    for path, layer in layers.items():
        layer.exchange, told[path].said = told[path], None
    try:
        loss = F.cross_entropy(model(x), y)
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    except Stop:
        path, exchange = next((p, e) for p, e in told.items() if e.said is not None)
        said = {f"{path}|{name}": value for name, value in (exchange.said or {}).items()}
        return said | {f"{path}|n": torch.tensor(float(exchange.n))}
    finally:
        for layer in layers.values():
            layer.exchange = None
    return None
