"""The signal that drift detectors watch: distance of a window's channel means from the user's statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedbn.nn.conversion import require_statistics
from fedbn.nn.hooks import inputs_of
from fedbn.nn.roles import statistics_layers

FEWEST = 8
"""Windows of a class before the next ones are compared with them."""


FLOOR = 1e-3
"""Least variance of a channel's mean between windows, relative to the source's variance of the channel."""


class ChannelMeans:
    """Channel means of windows at the inputs of a model's first BN layers.

    Args:
        model: the source; it is not changed.
        layers: how many.
    """

    def __init__(self, model: nn.Module, layers: int = 2) -> None:
        require_statistics(model, "drift detection")
        self.model = model
        self.layers = dict(list(statistics_layers(model).items())[:layers])
        scales = [m.running_var for m in self.layers.values()]
        self.scale = torch.cat([torch.as_tensor(v).double() for v in scales])

    def __call__(self, x: Tensor) -> Tensor:
        """``[b, sum of channels]`` in float64 for windows ``[b, *shape]``."""
        seen: list[Tensor] = []
        self.model.eval()
        with torch.no_grad(), inputs_of(self.layers, lambda _path, value: seen.append(value)):
            self.model(x)
        return torch.cat([v.double().flatten(2).mean(2) if v.dim() > 2 else v.double() for v in seen], 1)


@dataclass
class Context:
    """What one user's windows look like, class by class: a running mean and variance of `ChannelMeans`.

    Attributes:
        scale: ``[C]`` variance of each channel under the source.
        n: class -> windows met.
        mean, m2: class -> ``[C]`` mean and sum of squared deviations.
    """

    scale: Tensor
    n: dict[int, int] = field(default_factory=dict)
    mean: dict[int, Tensor] = field(default_factory=dict)
    m2: dict[int, Tensor] = field(default_factory=dict)

    def distance(self, m: Tensor, label: int) -> float | None:
        """The z of one window ``[C]``; None while too few of its class were met."""
        n = self.n.get(label, 0)
        if n < FEWEST:
            return None
        variance = torch.maximum(self.m2[label] / (n - 1), FLOOR * self.scale)
        return float(((m - self.mean[label]) ** 2 / variance).mean())

    def learn(self, m: Tensor, label: int) -> None:
        """Add one window ``[C]`` (Welford 1962)."""
        n = self.n[label] = self.n.get(label, 0) + 1
        old = self.mean.get(label, torch.zeros_like(m))
        new = self.mean[label] = old + (m - old) / n
        self.m2[label] = self.m2.get(label, torch.zeros_like(m)) + (m - old) * (m - new)
