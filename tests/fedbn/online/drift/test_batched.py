from __future__ import annotations

import numpy as np
import pytest

from fedbn.online.drift.batched import FLOOR, BatchedMonitor
from fedbn.online.drift.detectors import Adwin, PageHinkley
from fedbn.online.drift.signal import GroupStatistics


def test_batched_monitor_matches_statistics_of_single_users():
    draw = np.random.default_rng(0)
    classes, scale, detector = 3, np.array([1.0, 2.0, 0.5]), PageHinkley(threshold=2.0)
    monitor = BatchedMonitor(detector, scale, classes, capacity=3)
    statistics = {u: GroupStatistics(classes, scale, FLOOR) for u in "abc"}
    alarms = {u: detector.new() for u in "abc"}
    num_alarms = 0
    for t in range(150):
        means = draw.normal(size=(3, 3)) + (6 if t > 100 else 0)
        labels = draw.integers(0, classes, 3)
        results = monitor.observe(list("abc"), means, labels)
        for user, x, label, (z, drift) in zip("abc", means, labels.tolist(), results, strict=True):
            expected = statistics[user].distance(x, label)
            assert (z is None) == (expected is None)
            if expected is not None:
                assert z == pytest.approx(expected)
                alarms[user].update(np.log1p(statistics[user].deviations(x[None], [label])).mean())
                assert drift == alarms[user].drift_detected
                if drift:
                    num_alarms += 1
                    statistics[user], alarms[user] = GroupStatistics(classes, scale, FLOOR), detector.new()
            statistics[user].update(x[None], [label])
    assert num_alarms == monitor.num_alarms >= 3


def test_batched_monitor_evicts_least_recently_used():
    monitor = BatchedMonitor(Adwin(), np.ones(2), classes=2, capacity=2)
    for user in ("ann", "bob", "ann", "cem"):
        monitor.observe([user], np.ones((1, 2)), [0])
    assert list(monitor._users) == ["ann", "cem"]
    assert len(monitor._statistics.n) == 2 * 2
    assert monitor._statistics.n.sum() == 3
