"""Hooks of strategies run on each client's model while the clients train in one stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from fedbn.federation.setup import build_context
from fedbn.stacked.executors import ClientExecutor
from fedbn.stacked.hooks import before_step
from fedbn.stacked.layers import Unstackable
from fedbn.strategies.base import NormStrategy
from tests.fedbn.stacked.test_executors import in_double_precision, max_differences, run_n_rounds, unequal_users_run


@dataclass(frozen=True)
class EveryHook(NormStrategy):
    """Changes the model before training, gradients and weights before a step, and statistics after training."""

    name = "every-hook"
    about = "for tests"

    def before_local_training(self, model, data, progress):
        model.hidden[0].bias.data.add_(0.01 * len(data))
        return {"rows": torch.tensor(float(len(data)))}

    def set_training_mode(self, model, progress, aggregates=()):
        model.train()
        model.hidden[1].weight.data.mul_(1.1)

    def on_before_optimizer_step(self, model):
        model.hidden[0].weight.data.mul_(0.99)
        model.hidden[0].weight.grad = model.hidden[0].weight.grad * 2
        model.hidden[1].bias.grad = None
        model.hidden[1].weight.grad.add_(model.hidden[1].running_mean)

    def after_local_training(self, model):
        model.hidden[1].running_mean.mul_(2)
        return {"norm": model.hidden[0].weight.detach().norm()}


class Noisy(EveryHook):
    name: ClassVar[str] = "noisy"

    def on_before_optimizer_step(self, model):
        model.hidden[0].bias.grad.add_(torch.randn(model.hidden[0].bias.shape))


@pytest.mark.parametrize(
    ("kind", "how"), [(EveryHook, "stacked"), (Noisy, "the strategy draws random numbers before a step")]
)
def test_stacked_hooks_match_those_of_single_clients(kind, how):
    ctx = in_double_precision(build_context(unequal_users_run(f"{__name__}:{kind.__name__}", optimizer_state="reset")))
    executor = ClientExecutor("stacked", 1)
    expected, actual = (run_n_rounds(ctx, e, 4) for e in (ClientExecutor("one"), executor))
    assert executor.execution == {"train": [how]}
    assert max_differences(expected, actual)[0] < 1e-10


def test_stacked_hooks_send_notes(monkeypatch):
    ctx = in_double_precision(build_context(unequal_users_run(f"{__name__}:EveryHook")))
    notes = {}
    for name in ("one", "stacked"):
        executor, run = ClientExecutor(name, 1), ClientExecutor.run

        def spy(self, jobs, name=name, run=run):
            results = run(self, jobs)
            notes[name] = [update.notes for update, _ in results]
            return results

        monkeypatch.setattr(ClientExecutor, "run", spy)
        run_n_rounds(ctx, executor, 3, rounds=1)
        monkeypatch.undo()
    assert [n["rows"] for n in notes["stacked"]] == [n["rows"] for n in notes["one"]] == [25.0, 31.0, 37.0]
    torch.testing.assert_close(notes["stacked"], notes["one"])


def test_hook_must_remove_gradients_of_all_clients():
    models = [(m, dict(m.named_parameters())) for m in (nn.Linear(1, 1), nn.Linear(1, 1).eval())]

    def hook(model):
        model.bias.grad = None
        if model.training:
            model.weight.grad = None

    with pytest.raises(Unstackable, match="some clients only"):
        before_step(hook, models, ["weight", "bias"], [torch.ones(2, 1, 1), torch.ones(2, 1, 1)])
