r"""ATP: federated learning of how fast each part of a network adapts to a user's unlabeled windows.

Bao, Wei, Wang, He, 2023, *Adaptive test-time personalization for federated learning*, NeurIPS,
https://arxiv.org/abs/2310.18816; formulas as in the authors' released code. Every entry :math:`d` of the model (weight,
scale, shift, running mean or variance) has a rate :math:`\alpha_d` of either sign. With :math:`H` the mean entropy of
the predictions for a batch, the entries :math:`\theta_d` take one step

.. math::
    \theta'_d=\theta_d-\alpha_d g_d,\qquad g_d=\begin{cases}\partial H/\partial\theta_d&\text{weights, scales, shifts}\\
    \theta_d-\hat\theta_d&\text{statistics, with those }\hat\theta\text{ of the batch}\end{cases}

(variances are clamped at 0). Clients with labels learn the rates from the gradient of the cross-entropy :math:`L` after
that step, without second derivatives and with :math:`|d|` the number of values of an entry:

.. math:: \alpha_d\leftarrow\alpha_d+\eta\,\frac{\langle\partial L/\partial\theta'_d,\;g_d\rangle}{\sqrt{|d|}}.

Statistics are treated as parameters. For :math:`y=\gamma(x-\mu)/\sqrt{v+\epsilon}+\beta` this needs no special layer:
:math:`\partial L/\partial\mu=-\gamma(v+\epsilon)^{-1/2}\,\partial L/\partial\beta` and
:math:`\partial L/\partial v=-\tfrac12\gamma(v+\epsilon)^{-1}\,\partial L/\partial\gamma`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedbn.data.batching import batch_sizes
from fedbn.data.population import Examples
from fedbn.errors import UserError
from fedbn.nn.conversion import require_statistics
from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import State, clone, statistics_layers
from fedbn.tta.base import Step, entropy

RATES = "adaptation_rates"
"""Name of the buffer that holds the rates, ``[D]``."""

Loss = Callable[[Tensor], Tensor]


def add_rates(model: nn.Module) -> nn.Module:
    """Register a rate of 0 for each entry of a model, in place.

    Raises:
        UserError: a BN layer has no scale and shift of its own, no layer has running statistics, or a parameter is
            complex.

    >>> net = add_rates(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)))
    >>> net.adaptation_rates.shape, rated_names(net)[4:6]
    (torch.Size([8]), ['1.running_mean', '1.running_var'])
    """
    require_statistics(model, "ATP")
    layers = statistics_layers(model)
    if any(layer.weight is None for layer in layers.values()):
        raise UserError("ATP adapts scale and shift too: build the BN layers with affine=True")
    if len({id(p) for layer in layers.values() for p in (layer.weight, layer.bias)}) < 2 * len(layers):
        raise UserError("ATP needs a scale and a shift of its own for each BN layer: untie those that share them")
    if any(p.is_complex() for p in model.parameters()):
        raise UserError("ATP does not support complex parameters: choose another strategy")
    model.register_buffer(RATES, torch.zeros(len(rated_names(model))))
    return model


def rated_names(model: nn.Module) -> list[str]:
    """Names of the entries that have a rate, in the order of the rates."""
    parameters = {name for name, _ in model.named_parameters()}
    statistics = {name for pair in _statistics_names(model) for name in pair}
    return [name for name in model.state_dict() if name in parameters | statistics]


@dataclass(frozen=True)
class RatedEntries:
    """The entries of a model that have a rate; finding them takes longer than a small batch.

    Attributes:
        model: the model.
        names: their names, in the order of the rates.
        statistics: layers with running statistics by path, and the names of their running mean and variance.
        parameters, buffers: names of the model's parameters and buffers.
    """

    model: nn.Module
    names: list[str]
    statistics: dict[str, tuple[nn.Module, str, str]]
    parameters: list[str]
    buffers: list[str]

    @staticmethod
    def of(model: nn.Module) -> RatedEntries:
        """Find the entries of a model."""
        pairs = zip(statistics_layers(model).items(), _statistics_names(model), strict=True)
        statistics = {path: (layer, *names) for (path, layer), names in pairs}
        parameters, buffers = ([n for n, _ in named] for named in (model.named_parameters(), model.named_buffers()))
        return RatedEntries(model, rated_names(model), statistics, parameters, buffers)


def learn_rates(model: nn.Module, data: Examples, *, block: int, lr: float) -> None:
    """Learn a model's rates from labeled examples, in place. Each batch adapts a fresh copy of the model's state.

    Args:
        model: with rates; is put into evaluation mode.
        data: in the order of the batches.
        block: batch size.
        lr: learning rate of the rates.

    Raises:
        UserError: the rates have diverged.
    """
    model.eval()
    state, rated = clone(model.state_dict()), RatedEntries.of(model)
    rates = state.pop(RATES)
    for rows in torch.arange(len(data), device=data.y.device).split(batch_sizes(len(data), block)):
        x, y = data.x[rows], data.y[rows]
        adapted, direction = adapt_state(rated, state, rates, x)
        gradient = _gradient(rated, adapted, x, partial(F.cross_entropy, target=y))
        for d, name in enumerate(rated.names):
            rates[d] += lr * (gradient[name] * direction[name]).sum() / direction[name].numel() ** 0.5
        if not rates.isfinite().all():
            raise UserError("ATP's rates have diverged: give a smaller learning rate, e.g. --strategies atp:lr=0.0001")
    model.get_buffer(RATES).copy_(rates)


def adapt_state(rated: RatedEntries, state: State, rates: Tensor, x: Tensor) -> tuple[State, State]:
    """The state after one step on unlabeled examples ``[n, *shape]``, and the direction g of the step.

    Args:
        rated: of a model in evaluation mode, whose own state is not used.
        state: state before the step.
        rates: ``[D]``, in the order of `rated_names`.
        x: at least two examples; a variance stays unchanged if its channel has a single value.
    """
    inputs: dict[str, list[Tensor]] = {path: [] for path in rated.statistics}
    layers = {path: layer for path, (layer, _, _) in rated.statistics.items()}
    with capture_inputs(layers, lambda path, value: inputs[path].append(value.detach())):
        g = _gradient(rated, state, x, lambda out: entropy(out).mean())
    for path, (_, mean, var) in rated.statistics.items():
        if not inputs[path]:  # the layer does not run
            g[mean], g[var] = torch.zeros_like(state[mean]), torch.zeros_like(state[var])
            continue
        values = torch.cat([value.transpose(0, 1).flatten(1) for value in inputs[path]], 1)
        g[mean] = state[mean] - values.mean(1)
        g[var] = state[var] - values.var(1) if values.shape[1] > 1 else torch.zeros_like(state[var])
    adapted = state | {name: state[name] - rates[d] * g[name] for d, name in enumerate(rated.names)}
    return adapted | {var: adapted[var].clamp_min(0) for _, _, var in rated.statistics.values()}, g


def adaptation_step(model: nn.Module, *, online: bool) -> Step:
    """A step that adapts to each batch of a user's stream by the model's rates, then predicts it.

    Args:
        model: with rates, in evaluation mode; left in the state that made the last prediction.
        online: predict with the mean of the states adapted to each batch so far, otherwise with the last one. All are
            adapted from the model's initial state.
    """
    start, rated = clone(model.state_dict()), RatedEntries.of(model)
    rates = start.pop(RATES)
    mean, steps = {name: start[name] for name in rated.names}, 0

    def step(x: Tensor) -> Tensor:
        nonlocal mean, steps
        steps += 1
        adapted, _ = adapt_state(rated, start, rates, x)
        weight = 1 / steps if online else 1.0
        mean = {name: mean[name].lerp(adapted[name], weight) for name in rated.names}
        model.load_state_dict(mean, strict=False)
        with torch.no_grad():
            return cast(Tensor, model(x))

    return step


def _statistics_names(model: nn.Module) -> list[tuple[str, str]]:
    """Names of the running mean and variance of each layer that has them."""
    prefixes = [f"{path}." if path else "" for path in statistics_layers(model)]
    return [(f"{prefix}running_mean", f"{prefix}running_var") for prefix in prefixes]


def _gradient(rated: RatedEntries, state: State, x: Tensor, loss: Loss) -> State:
    """Gradient of a loss with respect to every entry that has a rate, at ``state``."""
    leaves = {name: state[name].detach().requires_grad_() for name in rated.parameters}
    # Tied entries are passed once: `functional_call` uses the value for all their names.
    buffers = {name: state[name] for name in rated.buffers if name in state}
    with torch.enable_grad():
        value = loss(functional_call(rated.model, buffers | leaves, (x,)))
        gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    out = dict(zip(leaves, gradients, strict=True))
    for path, (layer, mean, var) in rated.statistics.items():
        prefix = f"{path}." if path else ""
        scale, variance = state[f"{prefix}weight"], state[var] + cast(float, layer.eps)
        out[mean] = -scale * variance.rsqrt() * out[f"{prefix}bias"]
        out[var] = -scale / (2 * variance) * out[f"{prefix}weight"]
    return out
