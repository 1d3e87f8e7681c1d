r"""Measure statistics again under the weights that are used.

The input of layer :math:`\ell` depends on the statistics used in all layers before it, so they are fixed one
after the other: exact moments of layer 1, then of layer 2 given layer 1's, and so on. In the end every layer's
stored statistics are the moments of what it meets in evaluation. (A single training-mode pass over all data as
one batch gives the same but for :math:`n/(n-1)`: batches are normalized by the biased variance, PyTorch stores
the unbiased one.)
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fedbn.nn.hooks import inputs_of
from fedbn.nn.roles import State, statistics_layers
from fedbn.statistics.consensus import ConsensusStep
from fedbn.statistics.moments import Moments, pooled

CHUNK = 512
"""Rows a forward pass takes at once."""


class Reached(Exception):
    """Raised to stop a forward pass at the layer of interest."""


def set_statistics(layer: nn.Module, moments: Moments) -> None:
    """Write mean and (as PyTorch stores it) unbiased variance into a layer, in place."""
    bn = cast(Any, layer)
    variance = moments.stored_variance()
    with torch.no_grad():
        bn.running_mean.copy_(moments.mean)
        bn.running_var.copy_(variance)


def statistics_of(model: nn.Module) -> State:
    """The statistics of a model, by state name: running means and variances, and what else a layer averages."""
    out: State = {}
    for path, layer in statistics_layers(model).items():
        dot = f"{path}." if path else ""
        out |= {f"{dot}{name}": b for name, b in layer.named_buffers(recurse=False) if b.is_floating_point()}
    return out


def layer_moments(model: nn.Module, path: str, x: Tensor) -> Moments | None:
    """Exact moments of the input of the layer at ``path`` over all rows of ``x``, the model in evaluation mode.

    None where the layer is not in use (the other branch of a dual layer, for example).
    """
    layer = model.get_submodule(path)
    total: list[Moments] = []

    def see(_path: str, value: Tensor) -> None:
        total.append(Moments.of(value))
        raise Reached

    model.eval()
    with torch.no_grad(), inputs_of({path: layer}, see):
        for rows in x.split(CHUNK):
            try:
                model(rows)
            except Reached:
                continue
    return pooled(total) if total else None


def all_moments(model: nn.Module, x: Tensor) -> dict[str, Moments]:
    """Exact moments of every statistics layer's input in one evaluation-mode pass, statistics as they are."""
    layers = statistics_layers(model)
    seen: dict[str, Moments] = {}

    def see(path: str, value: Tensor) -> None:
        now = Moments.of(value)
        seen[path] = seen[path].merge(now) if path in seen else now

    model.eval()
    with torch.no_grad(), inputs_of(layers, see):
        for rows in x.split(CHUNK):
            model(rows)
    return seen


def agree_layerwise(model: nn.Module, x: Tensor) -> ConsensusStep:
    """A client's part in measuring statistics over all clients: one exchange of moments a layer.

    Yields this client's moments of a layer, hears the union over all clients, goes on with that.
    """
    for path, layer in statistics_layers(model).items():
        if (moments := layer_moments(model, path, x)) is None:
            continue
        aggregates = yield {path: moments}
        set_statistics(layer, aggregates[path])


def recalibrate(model: nn.Module, x: Tensor) -> nn.Module:
    """Replace the model's statistics by the exact ones of unlabeled data ``x``, in place; weights stay.

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
