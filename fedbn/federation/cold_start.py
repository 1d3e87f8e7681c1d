r"""Initial statistics for an unseen user, derived from the clients' statistics.

*initial*: the initial model. *mean*: mean of the clients' entries. *pooled*: the mean, with the variance of the union.
*nearest*: the entries of the client whose moments are nearest to the user's own (2-Wasserstein, summed over layers).
*mixture*: moments of all clients, weighted by the inverse of that distance. *prior*: pooled moments shrunk towards the
user's own. Per channel, the pooled moments count as :math:`n_0=V/\tau^2` windows (empirical Bayes), where :math:`V` is
the variance of the user's window means and :math:`\tau^2` the variance of the clients' means: channels in which clients
differ move quickly to the user's own moments, channels in which they agree stay near the pooled ones.

The user's own moments are measured on its unlabeled earlier recordings under the pooled statistics.

Users receive a summary of the clients' statistics. Only *nearest* and *mixture* need the statistics of single clients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fedbn.federation.context import RunContext
from fedbn.federation.metrics import Column
from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import State, statistics_layers
from fedbn.online.prior import MAX_N0, LayerPrior
from fedbn.statistics.moments import Moments, naive_mean, pooled_variance
from fedbn.statistics.recalibration import CHUNK


@dataclass(frozen=True)
class ClientStatistics:
    """Statistics of the clients as users receive them, without the indices of the clients.

    Attributes:
        mean: mean over the clients of each entry.
        variance: variance of the union of the clients, by name of the running variance.
        between: variance ``[C]`` of the clients' means in float64, by name of the running mean.
        clients: entries of each client, in an order that depends only on their values; may be empty.
    """

    mean: State
    variance: State
    between: State
    clients: tuple[State, ...] = ()

    @property
    def pooled(self) -> State:
        """Mean of the entries, with the variances of the union."""
        return self.mean | self.variance

    @cached_property
    def without_clients(self) -> ClientStatistics:
        """The same without the statistics of single clients."""
        return replace(self, clients=())


def summarize(ctx: RunContext, client_statistics: Mapping[int, State]) -> ClientStatistics | None:
    """Summarize the statistics of the clients by user index; None if there are none."""
    if not client_statistics:
        return None
    clients = [client_statistics[u] for u in sorted(client_statistics)]
    uniform = [1.0] * len(clients)
    pairs = _pairs(ctx, list(clients[0]))
    return ClientStatistics(
        {k: naive_mean([c[k] for c in clients], uniform) for k in clients[0]},
        _pooled_variances(clients, pairs, uniform),
        {mu: torch.stack([c[mu].double().cpu() for c in clients]).var(0, unbiased=False) for mu, _ in pairs.values()},
        tuple(sorted(clients, key=_digest)),
    )


def _digest(state: State) -> bytes:
    values = (v.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for v in state.values())
    return hashlib.sha256(b"".join(values)).digest()


def statistics_for(
    ctx: RunContext, user: int, summary: ClientStatistics | None, *, cold_starts: bool = True
) -> ClientStatistics | None:
    """Statistics that a user receives for the final evaluation.

    Unseen users receive all for their cold starts. A rule that starts from a prior over the clients needs only means
    and variances over the clients. Other users receive nothing.

    Args:
        ctx: the run's context.
        user: index of the user.
        summary: statistics of the clients.
        cold_starts: whether unseen users are scored with cold starts.
    """
    if summary is not None and user in ctx.population.unseen and cold_starts:
        return summary
    return summary.without_clients if summary is not None and ctx.uses_population_prior else None


def cold_starts(ctx: RunContext, state: State, statistics: ClientStatistics, x: Tensor) -> dict[Column, State]:
    """All possible initial states of an unseen user, by name.

    Args:
        ctx: the run's context.
        state: complete state of the user's assembled model.
        statistics: statistics of the clients.
        x: the user's unlabeled rows ``[n, *shape]``.

    Returns:
        Complete states. Only *initial* and *mean* if some statistics are not running means and variances; without
        *nearest* and *mixture* if the statistics of single clients are not given.
    """
    keys = list(statistics.mean)
    out: dict[Column, State] = {"initial": state | {k: ctx.initial[k] for k in keys}}
    out["mean"] = state | statistics.mean
    pairs = _pairs(ctx, keys)
    if not pairs or len(pairs) * 2 != sum(ctx.ownership.roles[k] == "statistics" for k in keys):
        return out
    out["pooled"] = state | statistics.pooled
    own, window_var = window_moments(ctx, out["pooled"], x)
    measured = {path: pair for path, pair in pairs.items() if path in own}  # without layers that do not run
    if clients := statistics.clients:
        distances = [_distance(client, own, measured) for client in clients]
        out["nearest"] = state | clients[min(range(len(clients)), key=distances.__getitem__)]
        weights = [1.0 / max(d, 1e-12) for d in distances]
        mixture = {k: naive_mean([c[k] for c in clients], weights) for k in keys}
        out["mixture"] = state | mixture | _pooled_variances(clients, pairs, weights)
    out["prior"] = state | _shrunk_moments(statistics, own, window_var, measured, len(x))
    return out


def population_prior_for(
    ctx: RunContext, state: State, statistics: ClientStatistics, x: Tensor
) -> dict[str, LayerPrior]:
    """Prior over a user's statistics per layer: pooled moments of the clients and their pseudo-counts ``n0``.

    The variance of window means, which ``n0`` depends on, is measured on the user's own windows.

    Args:
        ctx: the run's context.
        state: complete state of the user's assembled model.
        statistics: statistics of the clients.
        x: the user's unlabeled rows ``[n, *shape]``.
    """
    pairs = _pairs(ctx, list(statistics.mean))
    pooled = {k: statistics.pooled[k] for pair in pairs.values() for k in pair}
    _, window_var = window_moments(ctx, state | pooled, x)
    out: dict[str, LayerPrior] = {}
    for path, (mu, var) in pairs.items():
        n0 = torch.full_like(pooled[mu], MAX_N0)  # of layers that do not run
        if path in window_var:
            n0 = _pseudo_count(statistics, mu, window_var[path]).clamp_max(MAX_N0).to(n0)
        out[path] = LayerPrior(pooled[mu], pooled[var], n0)
    return out


def _pooled_variances(clients: Sequence[State], pairs: dict[str, tuple[str, str]], weights: Sequence[float]) -> State:
    return {
        var: pooled_variance([c[mu] for c in clients], [c[var] for c in clients], weights) for mu, var in pairs.values()
    }


def _pseudo_count(statistics: ClientStatistics, mu: str, window_var: Tensor) -> Tensor:
    """Number of windows that the pooled mean of each channel counts as, ``[C]`` float64."""
    return window_var / statistics.between[mu].cpu().clamp_min(1e-12)


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
    statistics: ClientStatistics,
    own: dict[str, Moments],
    window_var: dict[str, Tensor],
    pairs: dict[str, tuple[str, str]],
    windows: int,
) -> State:
    pooled = statistics.pooled
    out: State = dict(pooled)
    for path, (mu, var) in pairs.items():
        share = windows / (windows + _pseudo_count(statistics, mu, window_var[path]))
        mean, variance = pooled[mu].double().cpu(), pooled[var].double().cpu()
        gap = own[path].mean - mean
        variance = (1 - share) * variance + share * own[path].variance() + share * (1 - share) * gap**2
        out[mu], out[var] = (mean + share * gap).to(pooled[mu]), variance.to(pooled[var])
    return out
