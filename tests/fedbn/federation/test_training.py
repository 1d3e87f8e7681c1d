from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedbn.config import Plan
from fedbn.data.batching import batches
from fedbn.data.population import Examples
from fedbn.federation.client import OPTIMIZER, client_round
from fedbn.federation.setup import build_context
from fedbn.federation.training import epoch_batches, fit
from fedbn.optim.schedules import rate
from fedbn.strategies.base import Progress
from fedbn.tasks.classification import Classification
from tests import oracles
from tests.helpers import trained


def examples(n=21):
    draw = torch.Generator().manual_seed(0)
    return Examples(torch.randn(n, 4, generator=draw), torch.randint(0, 3, (n,), generator=draw), torch.zeros(n).long())


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).train()


@given(st.integers(1, 200), st.integers(1, 40))
def test_batches_cover_rows_once_without_single_row_batch(n, size):
    parts = list(batches(n, size, torch.Generator().manual_seed(1)))
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(n))
    if size > 1 and n > 1:
        assert min(map(len, parts)) > 1


def test_batches_join_single_row_to_previous_batch():
    for n, size in ((17, 8), (16, 8), (15, 8), (1, 8), (9, 1)):
        expected = [rows.tolist() for rows in oracles.epoch(n, size, 3, "shuffle", 2, 1, 0)]
        assert [rows.tolist() for rows in epoch_batches(n, Plan(batch_size=size), 3, 2, 1, 0)] == expected


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_rate_matches_definition(schedule):
    plan = Plan(rounds=7, lr=0.3, schedule=schedule)
    expected = [oracles.rate(plan, r) for r in range(1, 8)]
    assert [rate(plan, r) for r in range(1, 8)] == pytest.approx(expected, rel=1e-12)


def train(model, plan, **options):
    return fit(model, examples(), plan, task=Classification(), seed=1, round=1, user=0, **options)


def test_fit_is_reproducible_and_keeps_global_generator():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    a, b = network(), network()
    torch.set_rng_state(before)
    loss_a, _ = train(a, Plan(batch_size=8))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    loss_b, _ = train(b, Plan(batch_size=8))
    assert loss_a == loss_b
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_fit_full_batch_step_is_gradient_descent():
    a, b = network(), network()
    a[3].p = b[3].p = 0.0
    data = examples()
    train(a, Plan(batch_size=len(data), lr=0.1, momentum=0.0))
    F.cross_entropy(b(data.x), data.y).backward()
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y - 0.1 * y.grad, rtol=1e-5, atol=1e-6)


def test_fit_pull_keeps_named_parameters_near_target():
    start = network().state_dict()
    free, pulled = network(), network()
    train(free, Plan(batch_size=4, local_epochs=5))
    train(pulled, Plan(batch_size=4, local_epochs=5), pull=(5.0, {"0.weight": start["0.weight"]}))

    def distance(net, key):
        return float((net.state_dict()[key] - start[key]).norm())

    assert distance(pulled, "0.weight") < 0.5 * distance(free, "0.weight")
    assert distance(pulled, "4.weight") > 0.5 * distance(free, "4.weight")


def test_optimizer_state_is_kept_and_never_sent(small):
    ctx = build_context(small("fedbn", optimizer_state="keep"))
    update, client_state = client_round(ctx, 1, ctx.initial_server_state(), None, Progress(1, 2))
    buffers = {k.removeprefix(f"{OPTIMIZER}momentum_buffer/") for k in client_state if k.startswith(OPTIMIZER)}
    assert buffers == {n for n, _ in ctx.scratch.named_parameters()}
    assert not any(k.startswith(OPTIMIZER) for k in update.state)
    with_momentum, _ = client_round(ctx, 1, ctx.initial_server_state(), client_state, Progress(2, 2))
    retained = {k: client_state[k] for k in ctx.ownership.retained}
    without, _ = client_round(ctx, 1, ctx.initial_server_state(), retained, Progress(2, 2))
    assert with_momentum.loss != without.loss


def test_momentum_is_reset_between_rounds_by_default(small):
    reset, keep = trained(small("fedbn")), trained(small("fedbn", optimizer_state="keep"))
    assert reset.curve[0] == keep.curve[0]
    assert reset.curve[1] != keep.curve[1]
