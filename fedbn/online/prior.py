r"""Priors: initial statistics of new users, from the model, a population or labeled source data.

The expected variance of a new user is the mean of the users' variances plus the variance of their means. The weight of
the prior follows from the differences between users (empirical Bayes). With :math:`s^2` the variance of a window's
mean about its user's mean, and :math:`\tau^2` the variance of users' means, the weight that minimizes the expected
squared error of a user's mean is :math:`n_0=s^2/\tau^2` (Efron, Morris, 1975, *Data analysis using Stein's estimator*).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedbn.errors import UserError, unknown
from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import State, statistics_layers
from fedbn.online.layer import UserNorm, row_moments
from fedbn.online.statistics import Pair, Prior, mix
from fedbn.statistics.moments import Moments

OPTIONAL = ("n0", "alpha", "class_mean", "class_var")

MAX_N0 = 1e4
"""Largest weight of a prior in windows, used if users do not differ."""

WINDOWS = "windows"
"""Entry of a user's summary with its number of windows."""


@dataclass(frozen=True)
class LayerPrior:
    """Prior of one layer.

    Attributes:
        mean, var: ``[C]`` initial statistics.
        n0: ``[C]`` their weight in windows (rule ``pseudo`` uses it instead of its own).
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
    """Running statistics of a model, by path."""
    return {
        path: LayerPrior(m.running_mean.detach().clone(), m.running_var.detach().clone())  # type: ignore[operator]
        for path, m in statistics_layers(model).items()
    }


def source_prior(model: nn.Module, x: Tensor, y: Tensor, classes: int) -> dict[str, LayerPrior]:
    """Running statistics and the moments of each class on labeled source data.

    Args:
        model: the source model; it is set to evaluation mode.
        x: windows ``[n, *shape]``.
        y: labels ``[n]``.
        classes: number of classes K.

    Raises:
        UserError: a class has no example.
    """
    start = layer_priors(model)
    # Layers that do not run have the same moments for each class.
    moments = [{path: Moments.from_variance(1.0, p.mean, p.var) for path, p in start.items()} for _ in range(classes)]
    measured: dict[str, Moments] = {}

    def record(path: str, value: Tensor) -> None:
        new = Moments.of(value)
        measured[path] = measured[path].merge(new) if path in measured else new

    model.eval()
    with torch.no_grad(), capture_inputs(statistics_layers(model), record):
        for k in range(classes):
            if not (y == k).any():
                raise UserError(f"class {k} of {classes} has no example: pass source data of every class")
            model(x[y == k])
            moments[k] |= measured
            measured.clear()
    return {
        path: replace(
            prior,
            class_mean=torch.stack([m[path].mean for m in moments]).to(prior.mean),
            class_var=torch.stack([m[path].variance() for m in moments]).to(prior.mean),
        )
        for path, prior in start.items()
    }


def population_prior(model: nn.Module, users: Sequence[Tensor]) -> dict[str, LayerPrior]:
    """Initial statistics and their weight, from the differences between seen users.

    Only sums over users are needed, so a server can compute them with secure aggregation.

    Args:
        model: the source model; it is set to evaluation mode.
        users: windows ``[n_i, *shape]`` of each user; at least two windows of at least two users.

    Raises:
        UserError: too few users or windows.
    """
    return population_prior_from(model, [summarize_windows(model, windows) for windows in users])


def summarize_windows(model: nn.Module, windows: Tensor) -> State:
    """What `population_prior_from` needs of one user.

    Args:
        model: the source model; it is set to evaluation mode.
        windows: ``[n, *shape]``.

    Returns:
        ``windows``, their number, and for each layer that runs, with its path before a ``|``, in float64: ``mean``,
        ``[C]`` mean of the windows' means, ``spread``, ``[C]`` their unbiased variance, and ``var``, ``[C]`` variance
        of all values.
    """
    start, calls = layer_priors(model), dict[str, list[tuple[Pair, int]]]()

    def record(path: str, x: Tensor) -> None:
        pair = row_moments(x.double(), start[path].mean.double())
        calls.setdefault(path, []).append((pair, x[0, 0].numel()))

    summary = {WINDOWS: torch.tensor(len(windows))}
    if len(windows) < 2:  # `population_prior_from` refuses it
        return summary
    model.eval()
    with torch.no_grad(), capture_inputs(statistics_layers(model), record):
        model(windows)
    for path, inputs in calls.items():
        mean, within = _joint(inputs)
        var = within.mean(0) + mean.var(0, correction=0)
        summary |= {f"{path}|mean": mean.mean(0), f"{path}|spread": mean.var(0), f"{path}|var": var}
    return summary


def population_prior_from(model: nn.Module, users: Sequence[State]) -> dict[str, LayerPrior]:
    """The result of `population_prior` from the summaries of its users.

    Args:
        model: the source model.
        users: results of `summarize_windows`.

    Raises:
        UserError: too few users or windows, values that are not finite, or summaries of different models.

    >>> model = nn.BatchNorm1d(1)
    >>> users = [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])]
    >>> prior = population_prior_from(model, [summarize_windows(model, windows) for windows in users])[""]
    >>> prior.mean.item(), prior.var.item(), round(prior.n0.item(), 3)
    (3.0, 5.0, 0.286)
    """
    counts = [int(user[WINDOWS]) for user in users]
    if len(counts) < 2 or min(counts) < 2:
        raise UserError("differences between users need at least two users with two windows each: pass more")
    start = layer_priors(model)
    shapes = [{name: value.shape for name, value in user.items()} for user in users]
    measured = {path: p.mean for path, p in start.items() if f"{path}|mean" in users[0]}
    expected = {f"{path}|{name}": p.shape for path, p in measured.items() for name in ("mean", "spread", "var")}
    if any(shape != expected | {WINDOWS: torch.Size()} for shape in shapes):
        raise UserError("the users' statistics are those of different networks: measure all with the same model")
    if not all(value.isfinite().all() for user in users for value in user.values()):
        raise UserError("the statistics of a user are not finite: remove windows with NaN or infinite values")
    unmeasured = {path: replace(p, n0=torch.full_like(p.mean, MAX_N0)) for path, p in start.items()}
    return unmeasured | {path: _population(users, counts, path, like) for path, like in measured.items()}


def _joint(inputs: list[tuple[Pair, int]]) -> Pair:
    """Row moments over all inputs of a layer in a pass, which are given with their numbers of positions."""
    joint, total = inputs[0]
    for pair, positions in inputs[1:]:
        total += positions
        joint = mix(joint, pair, torch.as_tensor(positions / total).to(pair[0]))
    return joint


def _population(users: Sequence[State], counts: Sequence[int], path: str, like: Tensor) -> LayerPrior:
    means, window_var, variances = (
        torch.stack([user[f"{path}|{name}"] for user in users]) for name in ("mean", "spread", "var")
    )
    noise = torch.stack([s / n for s, n in zip(window_var, counts, strict=True)]).mean(0)
    tau2 = (means.var(0) - noise).clamp_min(0)
    n0 = (window_var.mean(0) / tau2.clamp_min(1e-300)).clamp_max(MAX_N0)
    var = variances.mean(0) + means.var(0, correction=0)
    return LayerPrior(means.mean(0).to(like), var.to(like), n0.to(like))


def pack_priors(layers: Mapping[str, UserNorm], priors: Mapping[str, LayerPrior]) -> tuple[Prior, dict[str, slice]]:
    """Concatenate the priors of all layers into one row; also return the columns of each layer.

    Raises:
        UserError: a path or shape that the model does not have, or a field that only some layers have.
    """
    for path in priors:
        if path not in layers:
            raise unknown("layer of the prior", path, layers)
    complete = {path: priors.get(path) or layer_priors(m)[""] for path, m in layers.items()}
    spans: dict[str, slice] = {}
    end = 0
    for path, layer in layers.items():
        channels, mean, var = layer.num_features, complete[path].mean, complete[path].var
        if not mean.shape == var.shape == (channels,):
            raise UserError(
                f"the prior of layer {path!r} has shape {list(mean.shape)} and the layer {channels} channels: "
                "compute it with the same model"
            )
        spans[path] = slice(end, end + channels)
        end += channels
    first = next(iter(layers.values())).running_mean
    device, wide = first.device, torch.promote_types(first.dtype, torch.float32)

    def concatenate(field: str) -> Any:
        values = [getattr(k, field) for k in complete.values()]
        return None if all(v is None for v in values) else torch.cat([v.to(device, wide) for v in values], -1)

    for field in OPTIONAL:
        missing = [path for path, k in complete.items() if getattr(k, field) is None]
        if 0 < len(missing) < len(complete):
            raise UserError(f"the prior has {field} for some layers only, not for {missing}: pass it for all or none")
    sizes = torch.tensor([m.num_features for m in layers.values()], device=device)
    return Prior(
        mean=concatenate("mean")[None],
        var=concatenate("var")[None],
        layer=torch.arange(len(layers), device=device).repeat_interleave(sizes),
        layers=len(layers),
        eps=torch.tensor([m.eps for m in layers.values()], dtype=wide, device=device).repeat_interleave(sizes),
        **{field: concatenate(field) for field in OPTIONAL},
    ), spans
