"""Stacked steps of every optimizer, clipping and augmentation equal those of each client by itself."""

from __future__ import annotations

import pytest
import torch

from fedbn.federation.setup import build_context
from fedbn.optim.base import optimizers
from fedbn.stacked.cohort import Cohort
from fedbn.stacked.executors import STACKED, ClientExecutor
from fedbn.stacked.layers import Unstackable
from fedbn.strategies.base import Progress
from tests.fedbn.stacked.test_executors import (
    NETWORK,
    VECTORIZED,
    in_double_precision,
    max_differences,
    run_n_rounds,
    unequal_users_run,
)

OPTIMIZERS = (
    *("sgd", "adam", "adam:weight_decay=0.1:betas=0.8+0.9", "adamw:weight_decay=0.1", "rmsprop"),
    "rmsprop:momentum=0.5:weight_decay=0.1",
)


def noisy(x):
    return x + 0.1 * torch.randn(x.shape)


def compare(model="mlp", **plan):
    """Largest difference of states and losses between clients one by one and side by side."""
    ctx = in_double_precision(build_context(unequal_users_run(model=model, weight_decay=0.0, **plan)))
    stacked = ClientExecutor("stacked", 1)
    results = [run_n_rounds(ctx, executor, None, 3) for executor in (ClientExecutor("one", 1), stacked)]
    assert stacked.execution["train"] == [STACKED]
    return max(max_differences(*results))


def test_every_optimizer_is_tested():
    assert {text.partition(":")[0] for text in OPTIMIZERS} == optimizers().keys()


@pytest.mark.parametrize("optimizer", [pytest.param(o, marks=[] if ":" in o else pytest.mark.slow) for o in OPTIMIZERS])
def test_stacked_optimizer_matches_each_client(optimizer):
    """Users have different numbers of steps, and keep their state over three rounds.

    Adaptive steps divide by the size of the gradient, so they enlarge the rounding of gradients that are almost zero.
    """
    assert compare(optimizer=optimizer, max_grad_norm=0.1) < 1e-6


@pytest.mark.parametrize("model", [NETWORK, pytest.param(VECTORIZED, marks=pytest.mark.slow)])
def test_stacked_adam_matches_in_every_layout(model):
    assert compare(model, optimizer="adamw", max_grad_norm=0.2) < 1e-6


@pytest.mark.parametrize("augment", ["translate+jitter", f"{__name__}:noisy"])
def test_stacked_augmentation_matches_each_client(augment):
    assert compare(augment=augment) < 1e-9


def test_clipping_limits_the_step():
    ctx = in_double_precision(
        build_context(unequal_users_run(optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, max_grad_norm=1e-6))
    )
    server, _, _ = run_n_rounds(ctx, ClientExecutor("stacked", 1), None, 1)
    moved = [float((server[n] - ctx.initial[n]).norm()) for n in ctx.ownership.shared_parameters]
    assert 0 < max(moved) < 1e-4


def test_other_optimizers_run_one_by_one():
    ctx = build_context(unequal_users_run(optimizer="torch.optim:Adagrad", weight_decay=0.0))
    with pytest.raises(Unstackable, match="optimizer torch.optim:Adagrad has no stacked step"):
        Cohort(ctx).program(Progress(1, 2))
    executor = ClientExecutor("stacked", 1)
    run_n_rounds(ctx, executor, 2, 1)
    assert executor.execution["train"] == ["optimizer torch.optim:Adagrad has no stacked step"]


def test_callables_that_can_draw_globally_are_not_run_on_threads():
    for augment, expected in (("jitter", True), (f"jitter+{__name__}:noisy", False)):
        executor = ClientExecutor("threads", 2)
        executor._start_run(build_context(unequal_users_run(augment=augment)))
        assert executor._is_thread_safe() is expected
