r"""Initial statistics for an unseen user, derived from the clients' statistics.

*initial*: the initial model. *mean*: mean of the clients' entries. *pooled*: the mean, with the variance of the union.
*nearest*: the entries of the client whose moments are nearest to the user's own (2-Wasserstein, summed over layers).
*mixture*: moments of all clients, weighted by the inverse of that distance. *prior*: pooled moments shrunk towards the
user's own. Per channel, the pooled moments count as :math:`n_0=V/\tau^2` windows (empirical Bayes), where :math:`V` is
the variance of the user's window means and :math:`\tau^2` the variance of the clients' means: channels in which clients
differ move quickly to the user's own moments, channels in which they agree stay near the pooled ones.

The user's own moments are measured on its unlabeled earlier recordings under the pooled statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedbn.federation.context import RunContext
from fedbn.federation.metrics import Column
from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import State, statistics_layers
from fedbn.online.prior import MAX_N0, LayerPrior
from fedbn.statistics.moments import Moments, naive_mean, pooled_variance
from fedbn.statistics.recalibration import CHUNK


def cold_starts(ctx: RunContext, state: State, client_statistics: dict[int, State], x: Tensor) -> dict[Column, State]:
    """All possible initial states of an unseen user, by name.

    Args:
        ctx: the run's context.
        state: complete state of the user's assembled model.
        client_statistics: statistics entries of each client.
        x: the user's unlabeled rows ``[n, *shape]``.

    Returns:
        Complete states. Only *initial* and *mean* if some statistics are not running means and variances.
    """
    clients = [client_statistics[u] for u in sorted(client_statistics)]
    uniform = [1.0] * len(clients)
    keys = list(clients[0])
    out: dict[Column, State] = {"initial": state | {k: ctx.initial[k] for k in keys}}
    mean = {k: naive_mean([c[k] for c in clients], uniform) for k in keys}
    out["mean"] = state | mean
    pairs = _pairs(ctx, keys)
    if not pairs or len(pairs) * 2 != sum(ctx.ownership.roles[k] == "statistics" for k in keys):
        return out
    pooled = mean | _pooled_moments(clients, pairs, uniform)
    out["pooled"] = state | pooled
    own, window_var = window_moments(ctx, out["pooled"], x)
    measured = {path: pair for path, pair in pairs.items() if path in own}  # without layers that do not run
    distances = [_distance(client, own, measured) for client in clients]
    out["nearest"] = state | clients[min(range(len(clients)), key=distances.__getitem__)]
    weights = [1.0 / max(d, 1e-12) for d in distances]
    mixture = {k: naive_mean([c[k] for c in clients], weights) for k in keys}
    out["mixture"] = state | mixture | _pooled_moments(clients, pairs, weights)
    out["prior"] = state | _shrunk_moments(pooled, clients, own, window_var, measured, len(x))
    return out


def population_prior_for(
    ctx: RunContext, state: State, client_statistics: dict[int, State], x: Tensor
) -> dict[str, LayerPrior]:
    """Prior over a user's statistics per layer: pooled moments of the clients and their pseudo-counts ``n0``.

    The variance of window means, which ``n0`` depends on, is measured on the user's own windows.

    Args:
        ctx: the run's context.
        state: complete state of the user's assembled model.
        client_statistics: statistics entries of each client.
        x: the user's unlabeled rows ``[n, *shape]``.
    """
    clients = [client_statistics[u] for u in sorted(client_statistics)]
    pairs = _pairs(ctx, list(clients[0]))
    pooled = _pooled_moments(clients, pairs, [1.0] * len(clients))
    _, window_var = window_moments(ctx, state | pooled, x)
    out: dict[str, LayerPrior] = {}
    for path, (mu, var) in pairs.items():
        n0 = torch.full_like(pooled[mu], MAX_N0)  # of layers that do not run
        if path in window_var:
            n0 = _pseudo_count(clients, mu, window_var[path]).clamp_max(MAX_N0).to(n0)
        out[path] = LayerPrior(pooled[mu], pooled[var], n0)
    return out


def _pooled_moments(clients: Sequence[State], pairs: dict[str, tuple[str, str]], weights: Sequence[float]) -> State:
    return {mu: naive_mean([c[mu] for c in clients], weights) for mu, _ in pairs.values()} | {
        var: pooled_variance([c[mu] for c in clients], [c[var] for c in clients], weights) for mu, var in pairs.values()
    }


def _pseudo_count(clients: Sequence[State], mu: str, window_var: Tensor) -> Tensor:
    """Number of windows that the pooled mean of each channel counts as, ``[C]`` float64."""
    between = torch.stack([c[mu].double().cpu() for c in clients]).var(0, unbiased=False)
    return window_var / between.clamp_min(1e-12)


def window_moments(ctx: RunContext, state: State, x: Tensor) -> tuple[dict[str, Moments], dict[str, Tensor]]:
    """Moments of every statistics layer's input, and the variance ``[C]`` of its window means."""
    model = ctx.load(state).eval()
    values: dict[str, Moments] = {}
    means: dict[str, Moments] = {}

    def record(path: str, value: Tensor) -> None:
        batch, batch_means = Moments.of(value), Moments.of(value.flatten(2).mean(2) if value.dim() > 2 else value)
        values[path] = values[path].merge(batch) if path in values else batch
        means[path] = means[path].merge(batch_means) if path in means else batch_means

    with torch.no_grad(), capture_inputs(statistics_layers(model), record):
        for rows in x.split(CHUNK):
            model(rows)
    return values, {path: m.variance() for path, m in means.items()}


def _pairs(ctx: RunContext, keys: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Names of each layer's running mean and variance, by layer path."""
    prefixes = {path: f"{path}." if path else "" for path in statistics_layers(ctx.scratch)}
    pairs = {path: (f"{prefix}running_mean", f"{prefix}running_var") for path, prefix in prefixes.items()}
    return {path: pair for path, pair in pairs.items() if set(pair) <= set(keys)}


def _distance(client: State, own: dict[str, Moments], pairs: dict[str, tuple[str, str]]) -> float:
    stored = {p: Moments.from_variance(1.0, client[mu].cpu(), client[var].cpu()) for p, (mu, var) in pairs.items()}
    return sum(float(own[path].w2(moments)) for path, moments in stored.items())


def _shrunk_moments(
    pooled: State,
    clients: Sequence[State],
    own: dict[str, Moments],
    window_var: dict[str, Tensor],
    pairs: dict[str, tuple[str, str]],
    windows: int,
) -> State:
    out: State = dict(pooled)
    for path, (mu, var) in pairs.items():
        share = windows / (windows + _pseudo_count(clients, mu, window_var[path]))
        mean, variance = pooled[mu].double().cpu(), pooled[var].double().cpu()
        gap = own[path].mean - mean
        variance = (1 - share) * variance + share * own[path].variance() + share * (1 - share) * gap**2
        out[mu], out[var] = (mean + share * gap).to(pooled[mu]), variance.to(pooled[var])
    return out
