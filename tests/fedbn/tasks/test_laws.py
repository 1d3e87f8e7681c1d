"""Laws that every task obeys, including those of other distributions."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fedbn.errors import UserError
from fedbn.tasks import parse_task, render_task, tasks
from fedbn.tasks.base import check_targets
from tests.fedbn.tasks.targets import CLASSES, N, example, kinds

every_task = pytest.mark.parametrize("name", tasks())


@every_task
def test_task_losses_are_independent_and_their_mean_is_the_loss(name):
    task, outputs, y = example(name)
    losses = task.losses(outputs, y)
    assert losses.shape == (N,)
    torch.testing.assert_close(losses, torch.cat([task.losses(outputs[i : i + 1], y[i : i + 1]) for i in range(N)]))
    torch.testing.assert_close(task.loss(outputs, y), losses.mean())
    assert losses.std() > 0


@every_task
def test_task_stacked_losses_are_those_of_each_client(name):
    task, outputs, y = example(name)
    stacked = torch.stack([outputs, outputs.flip(0)]).transpose(1, 2).contiguous()
    targets = torch.stack([y, y.roll(1, 0)])
    expected = torch.stack([task.losses(outputs, y), task.losses(outputs.flip(0), y.roll(1, 0))])
    torch.testing.assert_close(task.stacked_losses(stacked, targets), expected)


@every_task
def test_task_gradient_of_loss_is_finite_and_depends_on_outputs(name):
    task, outputs, y = example(name)
    (gradient,) = torch.autograd.grad(task.loss(outputs.requires_grad_(), y), outputs)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@every_task
def test_task_metrics_ignore_order_and_padding(name):
    task, outputs, y = example(name)
    expected = task.evaluate(outputs, y)
    assert set(expected) == set(task.directions)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    assert task.evaluate(outputs[order], y[order]) == pytest.approx(expected, rel=1e-12)
    padded = torch.stack([outputs, outputs.clone()]), torch.stack([y, y.clone()])
    padded[0][1, 5:] = 99.0
    padded[1][1, 5:] = padded[1][1, :1]
    whole, part = task.evaluate_users(*padded, [N, 5])
    assert whole == pytest.approx(expected, rel=1e-12)
    assert part == pytest.approx(task.evaluate(outputs[:5], y[:5]), rel=1e-12)


@every_task
def test_task_metrics_of_curves_are_some_of_all_metrics(name):
    task, outputs, y = example(name)
    curve = task.evaluate(outputs, y, final=False)
    assert task.main_metric in curve
    assert curve.items() <= task.evaluate(outputs, y).items()
    (row,) = task.evaluate_users(outputs[None], y[None], [N], final=False)
    assert row == pytest.approx(curve, rel=1e-12)


@every_task
def test_task_posterior_is_a_distribution_or_absent(name):
    task, outputs, _ = example(name)
    p = task.posterior(outputs)
    assert p is None or torch.equal(p.sum(1), torch.ones(N, dtype=p.dtype)) or p.sum(1).sub(1).abs().max() < 1e-12


@every_task
def test_task_text_is_parsed_back(name):
    task, _, _ = example(name)
    assert parse_task(render_task(task)) == task
    assert render_task(parse_task(name)) == name
    assert dataclasses.is_dataclass(task)
    assert hash(task) == hash(parse_task(render_task(task)))


@every_task
def test_task_refuses_targets_that_do_not_fit_and_suggests_another(name):
    task = parse_task(name)
    refused = {kind: y for kind, y in kinds().items() if task.check(y, CLASSES) is not None}
    assert refused
    for y in refused.values():
        with pytest.raises(UserError, match=r"^user ann: .*; choose --task \w+"):
            check_targets(task, y, CLASSES, "user ann")
