"""Tasks whose metrics are computed for many users at once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fedbn.tasks.classification import Classification


@dataclass(frozen=True)
class Doubled(Classification):
    """Replaces the metrics by a function for one user."""

    def scores(self, outputs, y):
        return {"accuracy": 2 * super().scores(outputs, y)["accuracy"]}


def size(outputs, y):
    return len(y)


OUTPUTS, Y = torch.tensor([[2.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 0, 0])


def test_evaluate_users_uses_replaced_scores():
    task = Doubled(extra_metrics=(f"{__name__}:size",))
    rows = task.evaluate_users(torch.stack([OUTPUTS, OUTPUTS]), torch.stack([Y, Y]), [3, 2])
    assert rows == [task.evaluate(OUTPUTS, Y), task.evaluate(OUTPUTS[:2], Y[:2])]
    assert [(row["accuracy"], row["size"]) for row in rows] == [(pytest.approx(4 / 3), 3), (1, 2)]
    assert task.evaluate(OUTPUTS, Y, final=False)["accuracy"] == pytest.approx(4 / 3)


def test_evaluate_users_computes_extra_metrics_in_the_last_evaluation_only():
    task = Classification(extra_metrics=(f"{__name__}:size",))
    stacked = torch.stack([OUTPUTS, OUTPUTS]), torch.stack([Y, Y]), [3, 2]
    assert [row["size"] for row in task.evaluate_users(*stacked)] == [3, 2]
    assert not any("size" in row for row in task.evaluate_users(*stacked, final=False))
