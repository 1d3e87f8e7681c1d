"""Optimizers of the clients, compared with plain loops of PyTorch, and their errors."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedbn.config import Plan
from fedbn.data.population import Examples
from fedbn.errors import UserError
from fedbn.federation.client import OPTIMIZER
from fedbn.federation.loop import federate
from fedbn.federation.run import plan_for, resolved_plan
from fedbn.federation.setup import build_context
from fedbn.federation.training import fit
from fedbn.optim.adamw import AdamW
from fedbn.optim.base import check_optimizer, optimizer, optimizer_text, optimizers
from fedbn.optim.schedules import rate, schedules
from fedbn.tasks.classification import Classification
from tests import oracles

PLAIN = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam:betas=0.8+0.9:weight_decay=0.1": lambda p: torch.optim.Adam(p, 0.05, betas=(0.8, 0.9), weight_decay=0.1),
    "adamw:weight_decay=0.1": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "rmsprop:momentum=0.5:alpha=0.9": lambda p: torch.optim.RMSprop(p, lr=0.05, alpha=0.9, momentum=0.5),
    "torch.optim:Adagrad:lr_decay=0.1": lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.1),
    f"{__name__}:without_lr": lambda p: torch.optim.NAdam(p, lr=0.02),
}
PLAN = Plan(lr=0.05, batch_size=8, local_epochs=2, max_grad_norm=0.5, optimizer_state="keep")


def without_lr(parameters):
    return torch.optim.NAdam(parameters, lr=0.02)


def no_optimizer(parameters):
    return list(parameters)


def failing(parameters, lr):
    raise ValueError("no such thing")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()


def examples():
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (21,), generator=draw)
    return Examples(torch.randn(21, 4, generator=draw).double(), y, torch.zeros(21).long())


def plain_loop(text, rounds):
    """Rounds of one optimizer in the same order of batches."""
    net, data = network(), examples()
    stepper = PLAIN[text](net.parameters())
    for round in range(1, rounds + 1):
        for epoch in range(2):
            for rows in oracles.epoch(21, 8, 3, "shuffle", round, 1, epoch):
                stepper.zero_grad()
                F.cross_entropy(net(data.x[rows]), data.y[rows]).backward()
                norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
                for p in net.parameters():
                    p.grad *= min(1.0, 0.5 / (float(norm) + 1e-6))
                stepper.step()
    return net


@pytest.mark.parametrize("text", PLAIN)
def test_fit_matches_plain_loop_over_rounds(text):
    """With kept state, two rounds are one run of the optimizer."""
    plan = replace(PLAN, optimizer=text, weight_decay=0.01 if text == "sgd" else 0.0)
    net, state = network(), {}
    for round in (1, 2):
        _, state = fit(net, examples(), plan, task=Classification(), seed=3, round=round, user=1, optimizer_state=state)
    for actual, expected in zip(net.state_dict().values(), plain_loop(text, 2).state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)
    assert state
    reset = network()
    for round in (1, 2):
        fit(reset, examples(), plan, task=Classification(), seed=3, round=round, user=1)
    assert not torch.allclose(reset[0].weight, net[0].weight, rtol=1e-6)


def test_every_optimizer_has_a_plain_loop():
    assert {text.partition(":")[0] for text in PLAIN} >= optimizers().keys()


def test_factory_without_lr_follows_the_schedule():
    plan = Plan(lr=0.1, optimizer=f"{__name__}:without_lr", rounds=4, schedule="step:every=1:factor=0.5")
    rates = [
        optimizer(plan.optimizer).build(network().parameters(), plan, rate(plan, r)).param_groups[0]["lr"]
        for r in (1, 2, 3)
    ]
    assert rates == pytest.approx([0.02, 0.01, 0.005])


def test_schedules_match_definitions():
    plan = Plan(rounds=7, lr=0.3, warmup=2)
    rates = {
        "constant": [0.3] * 5,
        "cosine": [0.3 * oracles.math.cos(oracles.math.pi * i / 10) ** 2 for i in range(5)],
        "step:every=2:factor=0.5": [0.3, 0.3, 0.15, 0.15, 0.075],
    }
    assert {text.partition(":")[0] for text in rates} == schedules().keys()
    for text, expected in rates.items():
        actual = [rate(replace(plan, schedule=text), r) for r in range(1, 8)]
        assert actual == pytest.approx([0.1, 0.2, *expected])


def test_optimizer_of_plan_sets_default_rate():
    assert plan_for("digits8").lr != plan_for("digits8", optimizer="adamw").lr == 0.001
    assert plan_for("digits8", optimizer="torch.optim:Adagrad").lr == 0.01
    assert plan_for("digits8", optimizer="adam", lr=0.2).lr == 0.2


def test_objects_become_texts():
    assert plan_for("digits8", optimizer=AdamW(eps=1e-6)).optimizer == "adamw:eps=1e-06"
    assert plan_for("digits8", optimizer=without_lr).optimizer == f"{__name__}:without_lr"
    assert optimizer_text(torch.optim.Adagrad) == "torch.optim.adagrad:Adagrad"


def test_factories_of_a_notebook_are_named_by_their_content():
    for make in (
        lambda: partial(torch.optim.NAdam, momentum_decay=0.1),
        lambda: lambda p, lr: torch.optim.NAdam(p, lr),
    ):
        text = optimizer_text(make())
        assert text.startswith("memory:")
        assert optimizer_text(make()) == text == optimizer_text(text)
        assert isinstance(optimizer(text).build(network().parameters(), PLAN, 0.1), torch.optim.NAdam)
    first, second = (optimizer_text(partial(torch.optim.NAdam, momentum_decay=d)) for d in (0.1, 0.2))
    assert first != second


@pytest.mark.parametrize("state", ["reset", "keep"])
def test_adam_state_stays_at_the_client(state, small):
    outcome = federate(small("fedbn", optimizer="adam", optimizer_state=state, rounds=1, clients_per_round=None))
    entries = {k.split("/")[1] for k in outcome.client_states[1] if k.startswith(OPTIMIZER)}
    assert entries == ({"step", "exp_avg", "exp_avg_sq"} if state == "keep" else set())
    assert not any("exp_avg" in k for k in outcome.server.state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adma"}, "unknown optimizer .*'adma'. Did you mean 'adam'"),
        ({"optimizer": "adam:beta=1"}, "unknown option of optimizer"),
        ({"optimizer": "adam:betas=0.9"}, "betas must be two numbers"),
        ({"optimizer": "adamw:eps=-1"}, "eps and weight_decay must be 0 or more"),
        ({"optimizer": "rmsprop:alpha=1"}, "alpha and momentum must be from 0 to below 1"),
        ({"optimizer": "nowhere.mine:make"}, "cannot import 'nowhere.mine'"),
        ({"optimizer": "torch.optim:Adagrat"}, "Did you mean 'Adagrad'"),
        ({"optimizer": "torch.optim:Adagrad:x"}, "write options as"),
        ({"optimizer": "torch:float32"}, "cannot be called"),
        ({"optimizer": 3}, "optimizer must be a text or a Optimizer, not 3"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "option of sgd only: write optimizer adam:weight_decay=0.1"),
        ({"optimizer": "torch.optim:Adagrad", "weight_decay": 0.1}, "option of sgd only: set it in the factory"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'. Did you mean 'cosine'"),
        ({"schedule": "step:every=0"}, "every must be at least 1"),
        ({"max_grad_norm": 0}, "max_grad_norm must be positive"),
        ({"warmup": -1}, "warmup must be at least 0"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, message):
    with pytest.raises(UserError, match=message) as caught:
        plan_for("digits8", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{__name__}:no_optimizer", "returned a list, not a torch.optim.Optimizer"),
        (f"{__name__}:failing", "ValueError: no such thing"),
        ("torch.optim:LBFGS", "cannot take a step without a closure"),
        ("torch.optim:Muon", "could not be built from the parameters"),
        ("torch.optim:SparseAdam", "cannot take a step"),
    ],
)
def test_unusable_factories_are_refused_before_training(text, message, small):
    if not hasattr(torch.optim, text.partition(":")[2]) and text.startswith("torch"):
        pytest.skip("this version of PyTorch does not have it")
    with pytest.raises(UserError, match=message) as caught:
        build_context(small("fedbn", optimizer=text))
    assert "\n" not in str(caught.value)


class Counting(torch.optim.SGD):
    """SGD with a number per parameter that is not a tensor."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["count"] = self.state[p].get("count", 0) + 1


def test_state_that_cannot_be_kept_is_refused():
    plan = resolved_plan(Plan(optimizer=f"{__name__}:Counting"))
    check_optimizer(plan, dict(network().named_parameters()))
    with pytest.raises(UserError, match="holds count, a int, which a client cannot keep: use optimizer_state=reset"):
        check_optimizer(replace(plan, optimizer_state="keep"), dict(network().named_parameters()))


def test_diverged_training_names_client_and_round(small):
    outcome = federate(small("global-naive", lr=1e30, rounds=2))
    (notice,) = outcome.notices()
    assert notice.startswith("training diverged: the loss of user user")
    assert "became NaN or infinite in round" in notice
    assert not federate(small("global-naive", rounds=1)).notices()
