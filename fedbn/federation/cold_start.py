r"""What an unseen user may start from, once clients have sent their statistics.

*initial*: the model as built. *mean*: mean of the clients' entries. *pooled*: the same with the variance of the
union. *nearest*: the entries of the client whose moments are nearest to the newcomer's own (2-Wasserstein, summed over
layers). *mixture*: all clients' moments, weighted by one over that distance. *prior*: pooled moments shrunk
towards the newcomer's own with an empirical-Bayes weight for every channel: worth :math:`n_0=V/\tau^2` windows, where
:math:`V` is the variance of the newcomer's window means and :math:`\tau^2` that of the clients' means. A channel in
which people differ is soon given up, one in which they agree is kept.

The newcomer's own moments are those of its unlabeled earlier recordings under the pooled statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedbn.federation.context import RunContext
from fedbn.federation.metrics import Column
from fedbn.nn.hooks import inputs_of
from fedbn.nn.roles import State, statistics_layers
from fedbn.online.prior import MOST, LayerPrior
from fedbn.statistics.moments import Moments, naive_mean, pooled_variance
from fedbn.statistics.recalibration import CHUNK


def starts(ctx: RunContext, state: State, client_statistics: dict[int, State], x: Tensor) -> dict[Column, State]:
    """A newcomer's possible models, by name of the start.

    Args:
        ctx: the run's context.
        state: the newcomer's model as assembled.
        client_statistics: entries that clients sent, by client.
        x: the newcomer's unlabeled rows ``[n, *shape]``.

    Returns:
        Whole states; only *initial* and *mean* where the entries are no running means and variances.
    """
    clients = [client_statistics[u] for u in sorted(client_statistics)]
    even = [1.0] * len(clients)
    keys = list(clients[0])
    out: dict[Column, State] = {"initial": state | {k: ctx.initial[k] for k in keys}}
    mean = {k: naive_mean([c[k] for c in clients], even) for k in keys}
    out["mean"] = state | mean
    pairs = _pairs(ctx, keys)
    if not pairs or len(pairs) * 2 != sum(ctx.ownership.roles[k] == "statistics" for k in keys):
        return out
    pooled = mean | _pooled(clients, pairs)
    out["pooled"] = state | pooled
    own, spread = window_moments(ctx, out["pooled"], x)
    distance = [_distance(client, own, pairs) for client in clients]
    out["nearest"] = state | clients[min(range(len(clients)), key=distance.__getitem__)]
    weights = [1.0 / max(d, 1e-12) for d in distance]
    mixed = {k: naive_mean([c[k] for c in clients], weights) for k in keys} | {
        var: pooled_variance([c[mu] for c in clients], [c[var] for c in clients], weights) for mu, var in pairs.values()
    }
    out["mixture"] = state | mixed
    out["prior"] = state | _shrunk(pooled, clients, own, spread, pairs, len(x))
    return out


def population(ctx: RunContext, state: State, client_statistics: dict[int, State], x: Tensor) -> dict[str, LayerPrior]:
    """What a user may expect to be, from what clients sent: pooled moments, and the windows that they are worth.

    How much one user's windows differ is taken from the user's own.

    Args:
        ctx: the run's context.
        state: the user's model as assembled.
        client_statistics: entries that clients sent, by client.
        x: the user's unlabeled rows ``[n, *shape]``.
    """
    clients = [client_statistics[u] for u in sorted(client_statistics)]
    pairs = _pairs(ctx, list(clients[0]))
    pooled = _pooled(clients, pairs)
    _, spread = window_moments(ctx, state | pooled, x)
    return {
        path: LayerPrior(pooled[mu], pooled[var], _worth(clients, mu, spread[path]).clamp_max(MOST).to(pooled[mu]))
        for path, (mu, var) in pairs.items()
    }


def _pooled(clients: Sequence[State], pairs: dict[str, tuple[str, str]]) -> State:
    even = [1.0] * len(clients)
    return {mu: naive_mean([c[mu] for c in clients], even) for mu, _ in pairs.values()} | {
        var: pooled_variance([c[mu] for c in clients], [c[var] for c in clients], even) for mu, var in pairs.values()
    }


def _worth(clients: Sequence[State], mu: str, spread: Tensor) -> Tensor:
    """Windows that the pooled mean of each channel is worth, ``[C]`` float64."""
    between = torch.stack([c[mu].double().cpu() for c in clients]).var(0, unbiased=False)
    return spread / between.clamp_min(1e-12)


def window_moments(ctx: RunContext, state: State, x: Tensor) -> tuple[dict[str, Moments], dict[str, Tensor]]:
    """Moments of every statistics layer's input, and the variance ``[C]`` of the means of single windows."""
    model = ctx.load(state).eval()
    values: dict[str, Moments] = {}
    means: dict[str, Moments] = {}

    def see(path: str, value: Tensor) -> None:
        now, rows = Moments.of(value), Moments.of(value.flatten(2).mean(2) if value.dim() > 2 else value)
        values[path] = values[path].merge(now) if path in values else now
        means[path] = means[path].merge(rows) if path in means else rows

    with torch.no_grad(), inputs_of(statistics_layers(model), see):
        for rows in x.split(CHUNK):
            model(rows)
    return values, {path: m.variance() for path, m in means.items()}


def _pairs(ctx: RunContext, keys: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Layer -> names of its running mean and variance among ``keys``."""
    out = {}
    for path in statistics_layers(ctx.scratch):
        dot = f"{path}." if path else ""
        if f"{dot}running_mean" in keys and f"{dot}running_var" in keys:
            out[path] = (f"{dot}running_mean", f"{dot}running_var")
    return out


def _distance(client: State, own: dict[str, Moments], pairs: dict[str, tuple[str, str]]) -> float:
    return sum(
        float(own[path].w2(Moments.from_variance(1.0, client[mu].cpu(), client[var].cpu())))
        for path, (mu, var) in pairs.items()
    )


def _shrunk(
    pooled: State,
    clients: Sequence[State],
    own: dict[str, Moments],
    spread: dict[str, Tensor],
    pairs: dict[str, tuple[str, str]],
    windows: int,
) -> State:
    out: State = dict(pooled)
    for path, (mu, var) in pairs.items():
        share = windows / (windows + _worth(clients, mu, spread[path]))
        mean, variance = pooled[mu].double().cpu(), pooled[var].double().cpu()
        gap = own[path].mean - mean
        out[mu] = (mean + share * gap).to(pooled[mu])
        out[var] = ((1 - share) * variance + share * own[path].variance() + share * (1 - share) * gap**2).to(
            pooled[var]
        )
    return out
