r"""Recompute the statistics of a model under its current weights.

The input of layer :math:`\ell` depends on the statistics of all layers before it. So the layers are processed in the
order in which they run: exact moments of layer 1, then of layer 2 given those of layer 1, and so on. In the end the
stored statistics of every layer are the moments of its input in evaluation mode. (A single training-mode pass over all
data as one batch gives the same result up to :math:`n/(n-1)`: batches are normalized by the biased variance, PyTorch
stores the unbiased one.) A layer that runs several times in a pass gets the joint moments of its inputs.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import State, statistics_layers
from fedbn.statistics.consensus import ConsensusStep
from fedbn.statistics.moments import Moments, pooled

CHUNK = 512
"""Number of rows per forward pass."""


class Reached(Exception):
    """Raised to end a forward pass at the layer of interest."""


def set_statistics(layer: nn.Module, moments: Moments) -> None:
    """Write the mean and the unbiased variance (as stored by PyTorch) into a layer, in place."""
    bn = cast(Any, layer)
    variance = moments.stored_variance()
    with torch.no_grad():
        bn.running_mean.copy_(moments.mean)
        bn.running_var.copy_(variance)


def statistics_of(model: nn.Module) -> State:
    """Statistics of a model by state name: running means and variances, and other averaged buffers of the layers."""
    statistics: State = {}
    for path, layer in statistics_layers(model).items():
        prefix = f"{path}." if path else ""
        statistics |= {f"{prefix}{name}": b for name, b in layer.named_buffers(recurse=False) if b.is_floating_point()}
    return statistics


def execution_order(model: nn.Module, x: Tensor) -> dict[str, int]:
    """The layers with statistics in the order in which an evaluation-mode pass runs them, and how often it does.

    Layers that do not run, such as those of an auxiliary head or the inactive branch of a dual layer, are left out.
    """
    calls: dict[str, int] = {}
    model.eval()
    with (
        torch.no_grad(),
        capture_inputs(statistics_layers(model), lambda path, _: calls.__setitem__(path, calls.get(path, 0) + 1)),
    ):
        model(x[:2])
    return calls


def layer_moments(model: nn.Module, path: str, x: Tensor, calls: int = 1) -> Moments:
    """Exact moments of the input of the layer at ``path`` over all rows of ``x``, in evaluation mode.

    Args:
        model: the network.
        path: path of a layer that runs.
        x: examples ``[n, *shape]``.
        calls: how often the layer runs in a pass; the moments cover all its inputs.
    """
    layer = model.get_submodule(path)
    parts: list[Moments] = []

    def measure(_path: str, value: Tensor) -> None:
        parts.append(Moments.of(value))
        if len(parts) % calls == 0:
            raise Reached

    model.eval()
    with torch.no_grad(), capture_inputs({path: layer}, measure):
        for rows in x.split(CHUNK):
            with suppress(Reached):
                model(rows)
    return pooled(parts)


def all_moments(model: nn.Module, x: Tensor) -> dict[str, Moments]:
    """Exact moments of the input of every layer with statistics, in one evaluation-mode pass."""
    layers = statistics_layers(model)
    measured: dict[str, Moments] = {}

    def measure(path: str, value: Tensor) -> None:
        moments = Moments.of(value)
        measured[path] = measured[path].merge(moments) if path in measured else moments

    model.eval()
    with torch.no_grad(), capture_inputs(layers, measure):
        for rows in x.split(CHUNK):
            model(rows)
    return measured


def agree_layerwise(model: nn.Module, x: Tensor) -> ConsensusStep:
    """A client's part in measuring statistics over all clients, with one exchange of moments per layer.

    For each layer it yields this client's moments, receives the merged moments of all clients and sets them.
    """
    for path, calls in execution_order(model, x).items():
        aggregate = yield {path: layer_moments(model, path, x, calls)}
        set_statistics(model.get_submodule(path), aggregate[path])


def recalibrate(model: nn.Module, x: Tensor) -> nn.Module:
    """Replace the model's statistics by the exact ones of unlabeled data ``x``, in place; weights do not change.

    Li, Wang, Shi, Liu, Hou, 2016 (AdaBN), https://arxiv.org/abs/1603.04779

    >>> _ = torch.manual_seed(0); net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)); x = torch.randn(50, 2)
    >>> out = recalibrate(net, x).eval()(x)
    >>> bool(out.mean(0).abs().max() < 1e-5)
    True
    """
    steps = agree_layerwise(model, x)
    try:
        moments = next(steps)
        while True:
            moments = steps.send(moments)
    except StopIteration:
        return model
