"""The service with models of tasks other than classification."""

from __future__ import annotations

import orjson
import pytest
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.nn.roles import CLASSES
from fedbn.online import SQLiteStore, personalize
from fedbn.tasks import parse_task
from fedbn_simulations.service.batching import Job
from fedbn_simulations.service.schema import advice, encode_answer, parse_labels
from fedbn_simulations.service.users import Limits, UserStore

SHAPE = (2, 8)
TASKS = {
    "regression:center=40:scale=10": 1,
    "multilabel": 3,
    "sequence": 3,
}


def network(task, outputs):
    torch.manual_seed(0)
    head = nn.Conv1d(4, outputs, 1)
    net = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), head)
    if not task.startswith("sequence"):
        net = nn.Sequential(*net[:3], nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, outputs))
    setattr(net, CLASSES, 0)
    return net.eval()


def users_of(task, **options):
    given = {"rule": "pseudo:n0=4", "task": parse_task(task)} | options
    return UserStore(network(task, TASKS[task]), SHAPE, (), **given)


def windows(n, seed=0):
    return 2 * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed)) + 3


@pytest.mark.parametrize("task", TASKS)
def test_service_returns_predictions_of_the_task_and_follows_users(task, tmp_path):
    users = users_of(task, store=SQLiteStore(tmp_path / "users.db"), limits=Limits(capacity=1))
    reference, parsed = personalize(network(task, TASKS[task]), "pseudo:n0=4"), parse_task(task)
    for name in ("ann", "bob"):
        users.enroll(name)
    users.flush()
    for i, name in enumerate(("ann", "bob", "ann", "ann")):  # one fits into memory, the other is read from the store
        x = windows(3, i)
        [answer] = users.answer([Job(name, x, True)])
        expected = parsed.predict(reference(x, user=name)).float()
        torch.testing.assert_close(torch.from_numpy(answer.predictions), expected, rtol=1e-4, atol=1e-5)
    assert answer.class_counts == []
    found = orjson.loads(encode_answer(answer, users.classes))
    assert [torch.tensor(a["outputs"]).shape for a in found["answers"]] == [answer.predictions.shape[1:]] * 3
    assert found["advice"]["action"] == "none"
    assert users.report("ann")["classes"] == {}
    assert users.snapshot("ann")
    users.calibrate("ann", windows(4), None, "freeze")
    [frozen] = users.answer([Job("ann", windows(2), False)])
    assert frozen.calibrated
    if task.startswith("regression"):
        assert 10 < answer.predictions.mean() < 70  # in the unit of the targets
    else:
        assert ((answer.predictions >= 0) & (answer.predictions <= 1)).all()


def test_service_without_classes_refuses_labels_and_class_rules():
    with pytest.raises(UserError, match="has no classes, so it cannot learn from labels: leave them out"):
        parse_labels([0], ())
    with pytest.raises(UserError, match="rule 'class-mixture' learns by class, and task 'regression' has no class"):
        users_of("regression:center=40:scale=10", rule="class-mixture")


def test_drift_without_classes_is_detected_over_all_windows():
    users = users_of("regression:center=40:scale=10", drift="page-hinkley:threshold=3:delta=0.02")
    users.enroll("ann")
    for i in range(10):
        [answer] = users.answer([Job("ann", windows(4, i), True)])
    assert answer.alarms == 0
    assert answer.distance is not None
    for i in range(10):
        [answer] = users.answer([Job("ann", 3 * windows(4, i) + 20, True)])
    assert answer.alarms > 0
    assert advice(answer, ())["text"].endswith("record some windows again")
