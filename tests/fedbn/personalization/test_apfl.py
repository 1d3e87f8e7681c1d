"""APFL against a slow reference from the paper's formulas, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fedbn.config import Plan
from fedbn.data.population import Examples
from fedbn.federation.training import fit
from fedbn.nn.roles import roles
from fedbn.personalization.apfl import APFL
from fedbn.personalization.base import ClientTrainer
from fedbn.strategies.base import Progress
from fedbn.tasks.classification import Classification

PLAN = Plan(rounds=2, local_epochs=3, batch_size=100, lr=0.1, momentum=0.8, weight_decay=0.05)
"""Full batches, so that shuffling has no effect."""


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def examples(n, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=draw, dtype=torch.float64) * (1 + seed) + seed
    return Examples(x, torch.randint(3, (n,), generator=draw), torch.zeros(n, dtype=torch.long))


def trainer_of(model, data, round):
    def run(model, **options):
        return fit(
            model, data, PLAN, task=Classification(), seed=0, round=round, user=0, **({"pull": (0.0, {})} | options)
        )[0]

    return ClientTrainer(model, data, PLAN, Progress(round, 2), roles(model), run, model.train)


def descend(parameters, buffers, loss_at):
    """Three steps of SGD with momentum and weight decay."""
    velocity = {k: torch.zeros_like(p) for k, p in parameters.items()}
    for _ in range(PLAN.local_epochs):
        leaves = {k: p.clone().requires_grad_() for k, p in parameters.items()}
        gradients = torch.autograd.grad(loss_at(leaves, buffers), list(leaves.values()))
        for (k, p), g in zip(parameters.items(), gradients):
            velocity[k] = PLAN.momentum * velocity[k] + g + PLAN.weight_decay * p
            parameters[k] = p - PLAN.lr * velocity[k]


def reference(net, received, own, data, alpha):
    """Shared parameters w and personal parameters v after one round; ``own``: v and its statistics, None at first."""
    names, model = [name for name, _ in net.named_parameters()], copy.deepcopy(net).train()

    def loss(parameters, buffers):
        return F.cross_entropy(functional_call(model, {**parameters, **buffers}, (data.x,)), data.y)

    w, other = {k: received[k] for k in names}, {k: t.clone() for k, t in received.items() if k not in names}
    descend(w, other, loss)
    own = own or received  # v starts from the received model
    v, statistics = {k: own[k] for k in names}, {k: t.clone() for k, t in own.items() if k not in names}
    descend(v, statistics, lambda p, b: loss({k: alpha * p[k] + (1 - alpha) * w[k] for k in names}, b))
    return {**w, **other}, {**v, **statistics}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_apfl_matches_formula(alpha):
    net, method = network(), APFL(alpha=alpha)
    for seed, n in ((0, 7), (1, 19)):  # two unequal clients
        data, own, expected_own = examples(n, seed), {}, None
        for round in (1, 2):
            received = {k: t.clone() for k, t in network().state_dict().items()}
            if round == 2:  # the server's model has moved
                received = {k: t * 1.2 if t.is_floating_point() else t for k, t in received.items()}
            model = copy.deepcopy(net)
            model.load_state_dict(received)
            trainer = trainer_of(model.train(), data, round)
            trainer.method_state = own
            method.train(trainer)
            own = trainer.method_state
            expected, expected_own = reference(net, received, expected_own, data, alpha)
            torch.testing.assert_close(dict(model.state_dict()), expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(dict(own), expected_own, rtol=1e-9, atol=1e-9)
        served, names = method.personalized_state(trainer), [name for name, _ in net.named_parameters()]
        for k, value in served.items():
            mixed = alpha * expected_own[k] + (1 - alpha) * expected[k] if k in names else expected_own[k]
            torch.testing.assert_close(value, mixed, rtol=1e-9, atol=1e-9)
