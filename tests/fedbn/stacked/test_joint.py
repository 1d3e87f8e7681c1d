"""Clients of several runs in one stack have the results of each run by itself."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedbn.federation.client_table import ClientTable
from fedbn.federation.setup import build_context
from fedbn.stacked.cohort import CohortRound
from fedbn.stacked.executors import ClientExecutor
from fedbn.stacked.joint import JoinedStackError, JoinedStacks, PendingStack, same_modules, trainer
from fedbn.strategies.base import Progress
from fedbn_clients.jobs import Train
from tests.fedbn.stacked.test_executors import NETWORK, in_double_precision, unequal_users_run
from tests.helpers import mostly_slow


def pending(run, dtype=torch.float64):
    """The stack of all clients in round 2, before it trains."""
    ctx = in_double_precision(build_context(run))
    stacks, users = [], list(ctx.trainers)

    def keep(stack):
        stacks.append(stack)
        return [0.0] * len(stack.clients.sizes)

    token = trainer.set(keep)
    try:
        executor, progress = ClientExecutor("stacked", 1), Progress(2, 3)
        cohort = CohortRound(users, [ctx.initial] * len(users), ClientTable(users), progress)
        if executor.train_cohort(ctx, cohort, float("inf")) is None:
            executor.run([Train(ctx, user, ctx.initial, None, progress) for user in users])
    finally:
        trainer.reset(token)
    (stack,) = stacks
    return stack


def results(stack, losses):
    optimizer_state = {f"optimizer/{n}": t for n, t in stack.clients.optimizer_state.items()}
    return stack.clients.tensors | optimizer_state | {"losses": torch.tensor(losses, dtype=torch.float64)}


CASES = {
    "seeds": ("fedbn", {"model": "mlp"}, {"seed": (0, 1, 5)}),
    "one client": ("centralized", {"model": "mlp"}, {"seed": (0, 1)}),
    "momentum": ("silobn", {"momentum": 0.9, "optimizer_state": "keep"}, {"lr": (0.01, 0.3), "seed": (0, 1)}),
    "both": ("local", {"optimizer": "adamw:weight_decay=0.1"}, {"lr": (0.01, 0.01, 0.1), "seed": (0, 1, 1)}),
    "rmsprop": ("group", {"optimizer": "rmsprop:momentum=0.5", "weight_decay": 0.0}, {"lr": (0.01, 0.02)}),
    "hooks": ("full-norm", {"model": "mlp"}, {"lr": (0.1, 0.2), "seed": (0, 1)}),
    "noise": ("silobn", {"model": NETWORK, "augment": "jitter", "proximal": 0.1}, {"seed": (0, 1)}),
    "clipping": ("weight-norm", {"max_grad_norm": 0.5, "schedule": "cosine"}, {"lr": (0.1, 0.2)}),
}


@pytest.mark.parametrize("case", mostly_slow(CASES, "momentum"))
def test_joined_stacks_match_separate_stacks(case):
    strategy, settings, varied = CASES[case]
    one = unequal_users_run(strategy, **{"weight_decay": 0.0, **settings})
    number = max(map(len, varied.values()))
    seeds, rates = varied.get("seed", [0] * number), varied.get("lr", [one.plan.lr] * number)
    runs = [replace(one, seed=s, plan=replace(one.plan, lr=lr)) for s, lr in zip(seeds, rates, strict=True)]
    joined, separate = [pending(run) for run in runs], [pending(run) for run in runs]
    assert all(joined[0].matches(stack) for stack in joined)
    tolerance = 1e-9 if one.plan.optimizer == "sgd" else 1e-6  # adaptive steps enlarge rounding
    for stack, losses, alone in zip(joined, JoinedStacks().fit(joined), separate, strict=True):
        expected, actual = results(alone, alone.fit()), results(stack, losses)
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-7, atol=tolerance)


def test_stacks_of_other_runs_do_not_match():
    stack = pending(unequal_users_run("fedbn", model="mlp"))
    ctx = stack.ctx
    for run in (replace(ctx.run, strategy="silobn"), replace(ctx.run, plan=replace(ctx.run.plan, momentum=0.5))):
        assert not stack.matches(replace(stack, ctx=replace(ctx, run=run)))
    assert stack.matches(replace(stack, ctx=replace(ctx, run=replace(ctx.run, seed=7))))
    assert not stack.matches(replace(stack, progress=Progress(1, 3)))
    assert not stack.matches(replace(stack, x=stack.x.float()))
    assert not stack.matches(replace(stack, ctx=replace(ctx, task=None)))
    assert not stack.matches(replace(stack, ctx=replace(ctx, scratch=copy.deepcopy(ctx.scratch).eval())))


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.values = [torch.tensor(value)]
        self.register_buffer("hidden", torch.tensor(1.0), persistent=False)
        self.register_buffer("stored", torch.tensor(value))


def test_same_modules_compares_what_is_not_in_the_state():
    one, other = Constant(1.0), Constant(1.0)
    other.stored += 1
    assert same_modules(one, other)
    assert not same_modules(one, Constant(2.0))
    other.hidden += 1
    assert not same_modules(one, other)
    assert not same_modules(nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU()))
    assert not same_modules(nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh()))
    parametrized = [nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)) for _ in range(2)]
    assert same_modules(*parametrized)


def test_failure_leaves_the_stacks_unchanged(monkeypatch):
    stacks = [pending(unequal_users_run("fedbn", model="mlp"))] * 2
    before = copy.deepcopy(results(stacks[0], []))

    def fails(program, clients, *args):
        for tensor in clients.tensors.values():
            tensor.zero_()
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fedbn.stacked.joint.fit_stack", fails)
    with pytest.raises(JoinedStackError):
        JoinedStacks().fit(stacks)
    assert all(torch.equal(value, before[name]) for name, value in results(stacks[0], []).items())
    assert isinstance(stacks[0], PendingStack)
