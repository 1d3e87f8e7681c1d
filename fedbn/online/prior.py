r"""What new users start from: the model's running statistics, or more that servers and source data can tell.

The variance a new user should expect is the mean of the users' variances plus the variance of their means. How many
windows that start is worth follows from how much users differ (empirical Bayes): with :math:`s^2` the variance of a
window's mean about its user's, and :math:`\tau^2` that of users' means, the weight that minimizes the expected squared
error of a user's mean is :math:`n_0=s^2/\tau^2` (Efron, Morris, 1975, *Data analysis using Stein's estimator*).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedbn.errors import UserError, unknown
from fedbn.nn.hooks import inputs_of
from fedbn.nn.roles import statistics_layers
from fedbn.online.layer import UserNorm, row_moments
from fedbn.online.statistics import Prior
from fedbn.statistics.moments import Moments

OPTIONAL = ("n0", "alpha", "class_mean", "class_var")

MOST = 1e4
"""Windows that a prior is worth at most: where users do not differ at all."""


@dataclass(frozen=True)
class LayerPrior:
    """What is known of one layer beforehand.

    Attributes:
        mean, var: ``[C]`` statistics to start from.
        n0: ``[C]`` windows that they are worth (rule ``pseudo`` uses it instead of its own).
        alpha: ``[C]`` in [0, 1], weight of the test statistics (rule ``ttn``).
        class_mean, class_var: ``[K, C]`` moments of each class on the source (the ``class-`` rules).
    """

    mean: Tensor
    var: Tensor
    n0: Tensor | None = None
    alpha: Tensor | None = None
    class_mean: Tensor | None = None
    class_var: Tensor | None = None


def layer_priors(model: nn.Module) -> dict[str, LayerPrior]:
    """The running statistics of a model, by path."""
    return {
        path: LayerPrior(m.running_mean.detach().clone(), m.running_var.detach().clone())  # type: ignore[operator]
        for path, m in statistics_layers(model).items()
    }


def source_prior(model: nn.Module, x: Tensor, y: Tensor, classes: int) -> dict[str, LayerPrior]:
    """Running statistics, and the moments of each class's activations on labeled source data.

    Args:
        model: put into evaluation mode.
        x: ``[n, *shape]``.
        y: ``[n]``.
        classes: K.

    Raises:
        UserError: a class has no example.
    """
    seen: dict[str, list[Moments]] = {path: [] for path in statistics_layers(model)}
    model.eval()
    with torch.no_grad(), inputs_of(statistics_layers(model), lambda path, v: seen[path].append(Moments.of(v))):
        for k in range(classes):
            if not (y == k).any():
                raise UserError(f"class {k} of {classes} has no example: give source data of every class")
            model(x[y == k])
    return {
        path: replace(
            start,
            class_mean=torch.stack([m.mean for m in seen[path]]).to(start.mean),
            class_var=torch.stack([m.variance() for m in seen[path]]).to(start.mean),
        )
        for path, start in layer_priors(model).items()
    }


def population_prior(model: nn.Module, users: Sequence[Tensor]) -> dict[str, LayerPrior]:
    """Start and its weight from how seen users differ, under the model as it is.

    Only sums over users enter, so a server can have them by secure aggregation.

    Args:
        model: put into evaluation mode.
        users: windows ``[n_i, *shape]`` of each user, two at least of two users at least.

    Raises:
        UserError: too few users or windows.
    """
    if len(users) < 2 or min(map(len, users)) < 2:
        raise UserError("how much users differ shows with two users and two windows each: give more")
    start = layer_priors(model)
    layers = statistics_layers(model)
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in layers}

    def see(path: str, x: Tensor) -> None:
        mean, within = row_moments(x.double(), start[path].mean.double())
        rows[path].append((mean, within))

    model.eval()
    with torch.no_grad(), inputs_of(layers, see):
        for windows in users:
            model(windows)
    return {path: _population(rows[path], start[path].mean) for path in layers}


def _population(users: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> LayerPrior:
    means = torch.stack([mean.mean(0) for mean, _ in users])
    spread = torch.stack([mean.var(0) for mean, _ in users])
    variances = torch.stack([within.mean(0) + mean.var(0, correction=0) for mean, within in users])
    noise = torch.stack([s / len(mean) for s, (mean, _) in zip(spread, users, strict=True)]).mean(0)
    tau2 = (means.var(0) - noise).clamp_min(0)
    n0 = (spread.mean(0) / tau2.clamp_min(1e-300)).clamp_max(MOST)
    var = variances.mean(0) + means.var(0, correction=0)
    return LayerPrior(means.mean(0).to(like), var.to(like), n0.to(like))


def packed(layers: Mapping[str, UserNorm], given: Mapping[str, LayerPrior]) -> tuple[Prior, dict[str, slice]]:
    """All layers side by side as one row, and the columns of each.

    Raises:
        UserError: a path or shape that the model does not have, or something known of some layers only.
    """
    for path in given:
        if path not in layers:
            raise unknown("layer of the prior", path, layers)
    known = {path: given.get(path) or layer_priors(m)[""] for path, m in layers.items()}
    spans: dict[str, slice] = {}
    end = 0
    for path, layer in layers.items():
        if known[path].mean.shape != (layer.num_features,) or known[path].var.shape != (layer.num_features,):
            raise UserError(
                f"the prior of layer {path!r} has shape {list(known[path].mean.shape)} and the layer "
                f"{layer.num_features} channels: make it with the same model"
            )
        spans[path] = slice(end, end + layer.num_features)
        end += layer.num_features
    wide = torch.promote_types(cast(Tensor, next(iter(layers.values())).running_mean).dtype, torch.float32)

    def together(field: str) -> Any:
        values = [getattr(k, field) for k in known.values()]
        return None if all(v is None for v in values) else torch.cat([v.to(device, wide) for v in values], -1)

    device = cast(Tensor, next(iter(layers.values())).running_mean).device
    for field in OPTIONAL:
        lacking = [path for path, k in known.items() if getattr(k, field) is None]
        if 0 < len(lacking) < len(known):
            raise UserError(f"the prior knows {field} of some layers only, not of {lacking}: give it for all or none")
    sizes = torch.tensor([m.num_features for m in layers.values()], device=device)
    return Prior(
        mean=together("mean")[None],
        var=together("var")[None],
        layer=torch.arange(len(layers), device=device).repeat_interleave(sizes),
        layers=len(layers),
        eps=torch.tensor([m.eps for m in layers.values()], dtype=wide, device=device).repeat_interleave(sizes),
        **{field: together(field) for field in OPTIONAL},
    ), spans
