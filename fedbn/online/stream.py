r"""Follow one user's stream: predict a block of windows, then let the statistics move towards it.

For every BN layer the statistics in use are the source's, worth :math:`n_0` windows, merged with the moments of
all windows met so far (pseudo-count rule; Schneider et al., 2020, https://arxiv.org/abs/2006.16971, made
cumulative). No label is used. The default prior weighs as much as 256 windows, five and a half minutes of HAPT at
its hop of 1.28 s: activity streams hold one class for long, and a light prior collapses on them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedbn.nn.hooks import inputs_of
from fedbn.nn.roles import statistics_layers
from fedbn.online.personalized import Personalized, personalize
from fedbn.online.prior import LayerPrior
from fedbn.online.rules.base import Rule
from fedbn.statistics.moments import Moments
from fedbn.statistics.recalibration import set_statistics

BLOCK = 8
"""Windows predicted between two updates."""

USER = "this"
"""The only user's name in what `follow_rule` returns."""


def predict_online(model: nn.Module, x: Tensor, *, prior: float = 256.0, block: int = BLOCK) -> Tensor:
    """Logits ``[n, classes]`` of a stream ``x`` in its order, each block predicted before it is learnt from.

    The model is left with the statistics it has after the stream.

    Args:
        model: a network with BN layers, in place.
        x: ``[n, *shape]`` in the order of arrival.
        prior: weight n0 of the source statistics, in windows; ``inf`` never moves.
        block: windows per update.

    >>> _ = torch.manual_seed(0); net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    >>> x = torch.randn(20, 2) + 5
    >>> torch.allclose(predict_online(net, x, prior=float("inf")), net(x))
    True
    """
    layers = statistics_layers(model)
    source = {p: (m.running_mean.clone(), m.running_var.clone()) for p, m in layers.items()}  # type: ignore[operator,union-attr]
    met: dict[str, Moments] = {}
    now: dict[str, Moments] = {}
    rows = 0
    out = []
    model.eval()
    with torch.no_grad(), inputs_of(layers, lambda path, value: now.__setitem__(path, Moments.of(value))):
        for part in x.split(block):
            out.append(model(part))
            rows += len(part)
            if prior == float("inf"):
                continue
            for path, layer in layers.items():
                met[path] = met[path].merge(now[path]) if path in met else now[path]
                mean, var = source[path]
                values_per_row = float(met[path].n) / rows
                weight = prior * values_per_row
                base = Moments.from_variance(weight, mean.cpu(), var.cpu())
                set_statistics(layer, met[path].shrink(base, weight) if weight else met[path])
    return torch.cat(out)


def follow_rule(
    model: nn.Module, x: Tensor, rule: Rule, prior: Mapping[str, LayerPrior] | None = None
) -> tuple[Tensor, Personalized]:
    """Logits ``[n, classes]`` of one user's stream ``x``, each window predicted before a rule learns from it.

    Args:
        model: a network with BN layers; it is not touched.
        x: ``[n, *shape]`` in the order of arrival.
        rule: how statistics follow.
        prior: what the user starts from; None: the model's statistics.

    Returns:
        The logits, and the network with what was learnt of the user, whose name is `USER`.

    Raises:
        UserError: the rule needs a prior that is not given.
    """
    net = personalize(model, rule, prior, capacity=1)
    return torch.cat([net(window, user=USER) for window in x.split(1)]), net
