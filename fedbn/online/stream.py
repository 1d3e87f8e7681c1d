r"""Online adaptation on one user's stream: predict a block of windows, then update the statistics with it.

Each BN layer uses the statistics of the source with a weight of :math:`n_0` windows, merged with the moments of all
windows so far (pseudo-count rule; Schneider et al., 2020, https://arxiv.org/abs/2006.16971, made cumulative). No label
is used. The default prior has the weight of 256 windows, which is five and a half minutes of HAPT at its hop of 1.28 s:
activity streams stay in one class for long periods, on which a small weight collapses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import statistics_layers
from fedbn.online.personalized import Personalized, personalize
from fedbn.online.prior import LayerPrior
from fedbn.online.rules.base import Rule
from fedbn.statistics.moments import Moments
from fedbn.statistics.recalibration import set_statistics

BLOCK = 8
"""Number of windows between two updates."""

USER = "this"
"""Name of the user in the model that `follow_rule` returns."""


def predict_online(model: nn.Module, x: Tensor, *, prior: float = 256.0, block: int = BLOCK) -> Tensor:
    """Logits ``[n, classes]`` of a stream; each block is predicted before it updates the statistics.

    Afterwards the model has the statistics at the end of the stream.

    Args:
        model: a network with BN layers. It is modified in place.
        x: ``[n, *shape]`` in the order of arrival.
        prior: weight n0 of the source statistics, in windows; ``inf`` disables adaptation.
        block: windows per update.

    >>> _ = torch.manual_seed(0); net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    >>> x = torch.randn(20, 2) + 5
    >>> torch.allclose(predict_online(net, x, prior=float("inf")), net(x))
    True
    """
    layers = statistics_layers(model)
    source = {p: (m.running_mean.clone(), m.running_var.clone()) for p, m in layers.items()}  # type: ignore[operator,union-attr]
    total: dict[str, Moments] = {}
    current: dict[str, Moments] = {}
    rows = 0
    out = []

    def record(path: str, value: Tensor) -> None:
        moments = Moments.of(value)
        current[path] = current[path].merge(moments) if path in current else moments

    model.eval()
    with torch.no_grad(), capture_inputs(layers, record):
        for part in x.split(block):
            current.clear()
            out.append(model(part))
            rows += len(part)
            if prior == float("inf"):
                continue
            for path, moments in current.items():  # without layers that do not run
                layer = layers[path]
                total[path] = total[path].merge(moments) if path in total else moments
                weight = prior * (float(total[path].n) / rows)  # in values
                base = Moments.from_variance(weight, *(t.cpu() for t in source[path]))
                set_statistics(layer, total[path].shrink(base, weight) if weight else total[path])
    return torch.cat(out)


def follow_rule(
    model: nn.Module, x: Tensor, rule: Rule, prior: Mapping[str, LayerPrior] | None = None
) -> tuple[Tensor, Personalized]:
    """Logits ``[n, classes]`` of one user's stream; each window is predicted before a rule learns from it.

    Args:
        model: a network with BN layers. It is not changed.
        x: ``[n, *shape]`` in the order of arrival.
        rule: the rule that updates the statistics.
        prior: initial statistics; None: those of the model.

    Returns:
        The logits, and the personalized model with the state of the user, whose name is `USER`.

    Raises:
        UserError: the rule needs a prior.
    """
    net = personalize(model, rule, prior, capacity=1)
    return torch.cat([net(window, user=USER) for window in x.split(1)]), net
