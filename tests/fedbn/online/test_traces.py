from __future__ import annotations

import numpy as np
import pytest
import torch

from fedbn.online.prequential import follow, metric_with_state, own_stream_oracle, source_baseline
from fedbn.online.prequential_metrics import FADING, regret, scores, windows_to_close
from fedbn.online.traces import ClassTrace, TaskTrace, trace_of
from fedbn.streams import FOREIGN, Stream
from fedbn.tasks import parse_task, tasks
from fedbn.tasks.classification import Classification
from tests.fedbn.tasks.targets import N, example

every_task = pytest.mark.parametrize("name", tasks())


def stream_of(y, user="ann"):
    return Stream(user, torch.arange(float(len(y)))[:, None], y, torch.zeros(len(y), dtype=torch.int64))


@every_task
def test_trace_scores_are_those_of_the_task(name):
    task, outputs, y = example(name)
    trace = trace_of(stream_of(y), outputs, task)
    found, expected = scores(trace, task), task.evaluate(outputs, y)
    assert isinstance(trace, ClassTrace) is (name == "classification")
    shared = expected.keys() & found.keys()
    assert task.example_metric in shared
    assert {k: found[k] for k in shared} == pytest.approx({k: expected[k] for k in shared}, rel=1e-12)
    assert found["n"] == N
    values = task.example_values(outputs, y).numpy()
    np.testing.assert_array_equal(trace.values, values)
    assert trace.higher_is_better is task.directions[task.example_metric]
    weights = FADING ** np.arange(N - 1, -1, -1)
    assert found[f"faded_{task.example_metric}"] == pytest.approx(np.average(values, weights=weights))


class Echo:
    """Predicts windows as they are, and records the posteriors of commits."""

    def __init__(self):
        self.posteriors = []

    def predict(self, x, user):
        return x

    def commit(self, posterior=None):
        self.posteriors.append(posterior)


def test_follow_without_classes_commits_no_posterior():
    task, net = parse_task("regression"), Echo()
    y = torch.tensor([0.0, -1.0, 4.0])
    (trace,) = follow(net, [stream_of(y)], task=task)
    assert net.posteriors == [None] * 3
    assert trace.values.tolist() == [0, 2, 2]  # -1 is a number, not the mark of a foreign window
    assert trace.metrics["mae"] == pytest.approx(4 / 3)
    assert len(trace) == trace.scored.sum() == 3


class Doubled(Classification):
    """Another task with classes."""

    def posterior(self, outputs):
        return (2 * outputs).softmax(1)


def test_trace_of_own_task_with_classes_leaves_out_foreign_windows():
    task, net = Doubled(), Echo()
    x = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 1.0]])
    y = torch.tensor([0, FOREIGN, 0])
    (trace,) = follow(net, [Stream("ann", x, y, torch.zeros(3, dtype=torch.int64))], task=task)
    assert isinstance(trace, TaskTrace)
    assert torch.equal(net.posteriors[0], (2 * x[:1]).softmax(1))
    np.testing.assert_array_equal(trace.values, [1, np.nan, 0])
    np.testing.assert_array_equal(np.isnan(trace.losses), [False, True, False])
    assert scores(trace, task)["accuracy"] == 0.5
    assert scores(trace, task)["n"] == 2


def errors(values):
    """Trace of a metric where lower is better."""
    values = np.array(values, float)
    return TaskTrace("u", "d", values, values, np.full(len(values), 1e-6), {}, higher_is_better=False)


def test_regret_and_windows_to_close_follow_the_direction():
    base, best = [errors([3.0] * 200)], [errors([1.0] * 200)]
    assert regret(best, base, best) == 0
    assert regret([errors([4.0] * 200)], base, best) == pytest.approx(1.5)
    assert windows_to_close(0.5, [errors([3.0] * 100 + [1.0] * 100)], base, best) == 125
    assert windows_to_close(0.5, base, base, best) is None


def test_oracles_and_forgetting_use_the_task():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).eval()
    s = stream_of(torch.randn(12) * 3)
    task = parse_task("regression")
    plain = source_baseline(net, s, task)
    with torch.no_grad():
        expected = (net(s.x)[:, 0] - s.y).abs().double().numpy()
    np.testing.assert_allclose(plain.values, expected, rtol=1e-6)
    assert not np.allclose(own_stream_oracle(net, s, task).values, plain.values, rtol=1e-2)

    class Fixed:
        def predict(self, x, user):
            return net(x).detach()

    data = type("Data", (), {"x": s.x, "y": s.y, "__len__": lambda self: 12})()
    assert metric_with_state(Fixed(), "ann", data, task, chunk=5) == pytest.approx(expected.mean(), rel=1e-6)


@every_task
def test_task_example_values_mean_is_the_metric(name):
    task, outputs, y = example(name)
    values = task.example_values(outputs, y)
    assert values.shape == (N,)
    assert values.dtype == torch.float64
    assert float(values.nanmean()) == pytest.approx(task.evaluate(outputs, y)[task.example_metric], rel=1e-9)
    one_by_one = [task.example_values(outputs[i : i + 1], y[i : i + 1]) for i in range(N)]
    assert torch.equal(values, torch.cat(one_by_one))


def test_example_values_without_positions_are_not_scored():
    task, outputs, y = example("segmentation")
    y[0] = -100
    trace = trace_of(stream_of(y), outputs, task)
    np.testing.assert_array_equal(trace.scored, [False] + [True] * (N - 1))
