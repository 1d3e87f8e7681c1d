from __future__ import annotations

import pytest
import torch

from fedbn.config import Plan
from fedbn.federation.setup import build_context
from fedbn.nn.roles import Role
from fedbn_simulations.engines.execute import execute
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.optimizer import server_step
from tests.helpers import mostly_slow, same, trained


def states():
    draw = torch.Generator().manual_seed(0)
    return [{"w": torch.randn(3, generator=draw), "b": torch.randn(2, 2, generator=draw)} for _ in range(3)]


def two_steps(**options):
    """A state and the means of two rounds, and the states after the optimizer's steps."""
    old, mean, second = states()
    step = server_step(Plan(**options))
    with task_identity(1):
        new, memory = step(1, old, mean, {})
        newer, _ = step(2, new, second, memory)
    return old, mean, second, new, newer


def test_server_step_fedadam_matches_formula():
    old, mean, second, new, newer = two_steps(server_optimizer="fedadam", server_lr=0.1)
    m = v = 0.0
    for round_, (previous, target, actual) in enumerate([(old, mean, new), (new, second, newer)], start=1):
        delta = target["w"].double() - previous["w"].double()
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
        rate = 0.1 * (1 - 0.99 ** (round_ + 1)) ** 0.5 / (1 - 0.9 ** (round_ + 1))
        expected = previous["w"] + rate * m / (v.sqrt() + 1e-3)
        torch.testing.assert_close(actual["w"].double(), expected, rtol=1e-5, atol=1e-6)
        assert actual["w"].dtype == torch.float32


def test_server_step_returns_momentum_as_state():
    old, mean, second, new, newer = two_steps(server_optimizer="fedavgm", server_lr=0.5)
    first = old["w"] - mean["w"]
    torch.testing.assert_close(new["w"], old["w"] - 0.5 * first)
    torch.testing.assert_close(newer["w"], new["w"] - 0.5 * (0.9 * first + new["w"] - second["w"]))


@pytest.mark.parametrize("optimizer", mostly_slow(["fedavgm", "fedadam", "fedyogi", "fedadagrad"], "fedadam"))
def test_server_step_does_not_update_statistics(optimizer, small):
    plain = trained(small("global-naive", rounds=1))
    run = small("global-naive", rounds=1, server_optimizer=optimizer, server_lr=0.3)
    stepped = execute(run, "reference")
    roles = build_context(run).ownership.roles
    for key, value in plain.server.state.items():
        equal = torch.equal(value, stepped.server.state[key])
        assert equal == (roles[key] is Role.STATISTICS), key


def test_server_step_is_none_without_optimizer():
    assert server_step(Plan()) is None
    assert same(states()[0], states()[0])
