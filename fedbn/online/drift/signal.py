"""Signals for drift detectors: how far a window is from earlier windows of its class."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from fedbn.nn.conversion import require_statistics
from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import statistics_layers

Floats = NDArray[np.float64]

MIN_WINDOWS = 8
"""Windows that a class needs before later windows are compared with it."""

FLOOR = 1e-3
"""Least variance of a channel's mean between windows, relative to the source's variance of the channel."""


def channel_means(x: Tensor) -> Floats:
    """Channel means ``[b, C]`` of windows or activations ``[b, C, ...]``."""
    means: Floats = (x.flatten(2).mean(2) if x.dim() > 2 else x).double().numpy()
    return means


class InputMeans:
    """Channel means of windows at the inputs of a model's first BN layers.

    Args:
        model: the source model. It is not changed.
        layers: number of layers.
    """

    def __init__(self, model: nn.Module, layers: int = 2) -> None:
        require_statistics(model, "drift detection")
        self.model = model
        self.layers = dict(list(statistics_layers(model).items())[:layers])
        self.scale = torch.cat([torch.as_tensor(m.running_var).double() for m in self.layers.values()])

    def __call__(self, x: Tensor) -> Tensor:
        """``[b, sum of channels]`` in float64 for windows ``[b, *shape]``."""
        inputs: list[Tensor] = []
        self.model.eval()
        with torch.no_grad(), capture_inputs(self.layers, lambda _path, value: inputs.append(value)):
            self.model(x)
        return torch.cat([v.double().flatten(2).mean(2) if v.dim() > 2 else v.double() for v in inputs], 1)


class GroupStatistics:
    """Running mean and variance of channel means, by group (Welford, 1962). A group is a class, or a user's class.

    Args:
        groups: number of groups.
        scale: ``[C]`` variance of each channel under the source.
        floor: least variance, relative to ``scale``.

    Attributes:
        n: ``[groups]`` number of windows.
        mean, m2: ``[groups, C]`` mean and sum of squared deviations.
    """

    def __init__(self, groups: int, scale: Floats, floor: float = FLOOR) -> None:
        self.scale, self.floor = scale, floor
        self.n = np.zeros(groups)
        self.mean = np.zeros((groups, len(scale)))
        self.m2 = np.zeros_like(self.mean)

    def deviations(self, x: Floats, group: ArrayLike) -> Floats:
        """Squared deviations ``[b, C]`` of windows ``x`` from the means of their groups, divided by the variances."""
        at = np.asarray(group)
        variance = np.maximum(self.m2[at] / np.maximum(self.n[at] - 1, 1)[:, None], self.floor * self.scale)
        squared: Floats = (x - self.mean[at]) ** 2 / variance
        return squared

    def distance(self, x: Floats, group: int) -> float | None:
        """Mean squared deviation z of one window ``[C]``; None if the group has fewer than `MIN_WINDOWS`."""
        if self.n[group] < MIN_WINDOWS:
            return None
        # NumPy sums in another order than PyTorch, whose bits published alarms depend on.
        return float(torch.from_numpy(self.deviations(x[None], [group])).mean())

    def update(self, x: Floats, group: ArrayLike) -> None:
        """Add windows ``[b, C]`` of different groups ``[b]``."""
        at = np.asarray(group)
        n, old = self.n[at] + 1, self.mean[at]
        new = old + (x - old) / n[:, None]
        self.m2[at] += (x - old) * (x - new)
        self.n[at], self.mean[at] = n, new

    def clear(self, groups: slice) -> None:
        """Remove all windows of some groups."""
        for table in (self.n, self.mean, self.m2):
            table[groups] = 0

    def grow(self, groups: int) -> None:
        """Append empty groups."""
        self.n, self.mean, self.m2 = (
            np.concatenate([t, np.zeros((groups, *t.shape[1:]))]) for t in (self.n, self.mean, self.m2)
        )
