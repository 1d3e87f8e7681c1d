r"""ATP: how fast each part of a network should follow a user's unlabeled windows, learnt by a federation.

Bao, Wei, Wang, He, 2023, *Adaptive test-time personalization for federated learning*, NeurIPS,
https://arxiv.org/abs/2310.18816; formulas as in the authors' released code. Every entry :math:`d` of the model, weight,
scale, shift, running mean or variance, has a rate :math:`\alpha_d`, of either sign. With :math:`H` the mean entropy of
the answers to a batch, entries :math:`\theta_d` move by one step

.. math::
    \theta'_d=\theta_d-\alpha_d g_d,\qquad g_d=\begin{cases}\partial H/\partial\theta_d&\text{weights, scales, shifts}\\
    \theta_d-\hat\theta_d&\text{statistics, with those }\hat\theta\text{ of the batch}\end{cases}

(variances are kept at 0 or more), and clients with labels learn the rates by the gradient of the cross-entropy
:math:`L` after that step, without second derivatives and with :math:`|d|` the number of values of an entry:

.. math:: \alpha_d\leftarrow\alpha_d+\eta\,\frac{\langle\partial L/\partial\theta'_d,\;g_d\rangle}{\sqrt{|d|}}.

Statistics are treated as parameters. For :math:`y=\gamma(x-\mu)/\sqrt{v+\epsilon}+\beta` no layer of its own is needed:
:math:`\partial L/\partial\mu=-\gamma(v+\epsilon)^{-1/2}\,\partial L/\partial\beta` and
:math:`\partial L/\partial v=-\tfrac12\gamma(v+\epsilon)^{-1}\,\partial L/\partial\gamma`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedbn.data.batching import sizes
from fedbn.data.population import Examples
from fedbn.errors import UserError
from fedbn.nn.conversion import require_statistics
from fedbn.nn.hooks import inputs_of
from fedbn.nn.roles import State, clone, statistics_layers
from fedbn.tta.base import Step, entropy

RATES = "adaptation_rates"
"""Name of the model's entry that holds the rates, ``[D]``."""

Loss = Callable[[Tensor], Tensor]


def add_rates(model: nn.Module) -> nn.Module:
    """Give a model a rate of 0 for each of its entries, in place.

    Raises:
        UserError: a BN layer without scale and shift, or none with statistics.

    >>> net = add_rates(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)))
    >>> net.adaptation_rates.shape, rated(net)[4:6]
    (torch.Size([8]), ['1.running_mean', '1.running_var'])
    """
    require_statistics(model, "ATP")
    if any(layer.weight is None for layer in statistics_layers(model).values()):
        raise UserError("ATP adapts scale and shift too: build the BN layers with affine=True")
    model.register_buffer(RATES, torch.zeros(len(rated(model))))
    return model


def rated(model: nn.Module) -> list[str]:
    """Names of the entries that have a rate, in the order of the rates."""
    parameters = {name for name, _ in model.named_parameters()}
    statistics = {name for pair in _pairs(model) for name in pair}
    return [name for name in model.state_dict() if name in parameters | statistics]


def learn_rates(model: nn.Module, data: Examples, *, block: int, lr: float) -> None:
    """Learn a model's rates from labeled examples, in place; every batch adapts the same model, which stays as it is.

    Args:
        model: with rates; put into evaluation mode.
        data: in the order in which batches are to be met.
        block: examples a batch.
        lr: of the rates.

    Raises:
        UserError: the rates have diverged.
    """
    model.eval()
    state, names = clone(model.state_dict()), rated(model)
    rates = state.pop(RATES)
    for rows in torch.arange(len(data), device=data.y.device).split(sizes(len(data), block)):
        x, y = data.x[rows], data.y[rows]
        moved, unlabeled = adapted(model, state, rates, x)
        labeled = _gradient(model, moved, x, partial(F.cross_entropy, target=y))
        for d, name in enumerate(names):
            rates[d] += lr * (labeled[name] * unlabeled[name]).sum() / unlabeled[name].numel() ** 0.5
        if not rates.isfinite().all():
            raise UserError("ATP's rates have diverged: give a smaller learning rate, e.g. --strategies atp:lr=0.0001")
    model.get_buffer(RATES).copy_(rates)


def adapted(model: nn.Module, state: State, rates: Tensor, x: Tensor) -> tuple[State, State]:
    """A state after one step on unlabeled examples ``[n, *shape]``, and the step's direction g.

    Args:
        model: in evaluation mode; its own state does not matter.
        state: to set out from.
        rates: ``[D]``, in the order of `rated`.
        x: two examples or more; of a single value a channel's variance is not moved.
    """
    met: dict[str, Tensor] = {}
    with inputs_of(statistics_layers(model), lambda path, value: met.__setitem__(path, value.detach())):
        g = _gradient(model, state, x, lambda out: entropy(out).mean())
    for path, (mean, var) in zip(statistics_layers(model), _pairs(model), strict=True):
        values = met[path].transpose(0, 1).flatten(1)
        g[mean] = state[mean] - values.mean(1)
        g[var] = state[var] - values.var(1) if values.shape[1] > 1 else torch.zeros_like(state[var])
    moved = state | {name: state[name] - rates[d] * g[name] for d, name in enumerate(rated(model))}
    return moved | {var: moved[var].clamp_min(0) for _, var in _pairs(model)}, g


def follower(model: nn.Module, *, online: bool) -> Step:
    """Answers batches of a user's stream after a step on each, by the model's rates.

    Args:
        model: with rates, in evaluation mode; always left in the state that answered last.
        online: answer with the mean of the states adapted to each batch so far; otherwise with the last one. All set
            out from the model as it was.
    """
    start, names = clone(model.state_dict()), rated(model)
    rates = start.pop(RATES)
    mean, steps = {name: start[name] for name in names}, 0

    def step(x: Tensor) -> Tensor:
        nonlocal mean, steps
        steps += 1
        now, _ = adapted(model, start, rates, x)
        share = 1 / steps if online else 1.0
        mean = {name: mean[name].lerp(now[name], share) for name in names}
        model.load_state_dict(mean, strict=False)
        with torch.no_grad():
            return cast(Tensor, model(x))

    return step


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of running mean and variance of each layer that keeps them."""
    dots = [f"{path}." if path else "" for path in statistics_layers(model)]
    return [(f"{dot}running_mean", f"{dot}running_var") for dot in dots]


def _gradient(model: nn.Module, state: State, x: Tensor, loss: Loss) -> State:
    """Gradient of a loss by every entry that has a rate, at ``state``."""
    leaves = {name: state[name].detach().requires_grad_() for name, _ in model.named_parameters()}
    with torch.enable_grad():
        value = loss(functional_call(model, {**state, **leaves}, (x,)))
        found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    out = dict(zip(leaves, found, strict=True))
    for (path, layer), (mean, var) in zip(statistics_layers(model).items(), _pairs(model), strict=True):
        dot = f"{path}." if path else ""
        scale, spread = state[f"{dot}weight"], state[var] + cast(float, layer.eps)
        out[mean] = -scale * spread.rsqrt() * out[f"{dot}bias"]
        out[var] = -scale / (2 * spread) * out[f"{dot}weight"]
    return out
