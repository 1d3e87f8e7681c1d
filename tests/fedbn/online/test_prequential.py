from __future__ import annotations

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch import nn

from fedbn.data.population import Examples
from fedbn.nn.inference import logits
from fedbn.nn.roles import clone
from fedbn.online import personalize, source_prior
from fedbn.online.prequential import (
    ActiveLabeling,
    balanced_oracle,
    balanced_rows,
    follow,
    follow_blocks,
    metric_with_state,
    own_stream_oracle,
    source_baseline,
)
from fedbn.online.prequential_metrics import (
    calibration_error,
    cost,
    fading_mean,
    harmed,
    judge_alarms,
    regret,
    score,
    windows_to_close,
    worst_decile,
)
from fedbn.online.traces import ClassTrace
from fedbn.statistics.recalibration import recalibrate
from fedbn.streams import FOREIGN, Stream
from tests.helpers import same


class Counting:
    """Predicts the number of commits of the user so far, modulo the number of classes."""

    def __init__(self, classes=3):
        self.counts, self.last, self.calls, self.classes = Counter(), [], [], classes

    def predict(self, x, user):
        self.last = list(user)
        self.calls.append(("predict", tuple(user)))
        labels = torch.tensor([self.counts[u] % self.classes for u in user])
        return 10.0 * nn.functional.one_hot(labels, self.classes)

    def commit(self, posterior=None):
        assert torch.allclose(posterior.sum(1), torch.ones(len(self.last)))
        self.calls.append(("commit", tuple(self.last)))
        self.counts.update(self.last)


def make_stream(user, y, x=None):
    y = torch.tensor(y)
    return Stream(user, torch.zeros(len(y), 2) if x is None else x, y, torch.zeros(len(y), dtype=torch.int64))


def trace(correct, user="a", digest="d"):
    """Trace with correct predictions where ``correct`` is true; None: not scored."""
    y = np.array([FOREIGN if c is None else 1 for c in correct])
    predicted = np.array([1 if c else 0 for c in correct])
    n = len(correct)
    return ClassTrace(
        user, digest, y, predicted, np.full(n, 0.5), np.where(y == FOREIGN, np.nan, 0.7), np.full(n, 1e-6)
    )


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).eval()


def test_follow_predicts_before_commit_for_any_lengths():
    net = Counting()
    a, b = follow(net, [make_stream("a", [0, 1, 2, 0]), make_stream("b", [0, 1])])
    assert net.calls[:2] == [("predict", ("a", "b")), ("commit", ("a", "b"))]
    assert net.calls[-1] == ("commit", ("a",))
    assert (a.predicted.tolist(), b.predicted.tolist()) == ([0, 1, 2, 0], [0, 1])
    assert score(a).accuracy == 1
    assert (a.seconds > 0).all()


def test_follow_many_streams_matches_single_streams():
    streams = [make_stream("a", [0, 0, 1]), make_stream("b", [2, 1, 0, 1, 0])]
    for a, s in zip(follow(Counting(), streams), streams):
        (b,) = follow(Counting(), [s])
        assert a.predicted.tolist() == b.predicted.tolist()
        np.testing.assert_array_equal(a.nll, b.nll)


def test_follow_rejects_two_streams_of_a_user():
    with pytest.raises(ValueError, match="each user must have one stream"):
        follow(Counting(), [make_stream("a", [0]), make_stream("a", [1])])


class Recording(Counting):
    """Records the posteriors of commits. Always predicts class 0."""

    def __init__(self):
        super().__init__()
        self.posteriors = []

    def predict(self, x, user):
        self.last = list(user)
        return torch.tensor([[2.0, 0, 0]]).repeat(len(x), 1)

    def commit(self, posterior=None):
        self.posteriors.append(posterior)


def test_active_labeling_queries_rarest_class_within_budget():
    net = Recording()
    follow(net, [make_stream("a", [1, 2, 0, 0, 1]), make_stream("b", [FOREIGN, 0, 1])], ActiveLabeling(budget=3))
    classes = [rows.argmax(1).tolist() for rows in net.posteriors]
    labeled = [(rows.amax(1) == 1).tolist() for rows in net.posteriors]
    # a: 1, 2 and 0 are labeled, which exhausts the budget. b: the foreign window cannot be labeled; after a label for
    # class 0, it is not queried while the other classes have none.
    assert [s[0] for s in labeled] == [True, True, True, False, False]
    assert [c[0] for c in classes] == [1, 2, 0, 0, 0]
    assert [s[1] for s in labeled[:3]] == [False, True, False]


def test_follow_uses_no_labels_by_default():
    net, other = Recording(), Recording()
    follow(net, [make_stream("a", [1, 2, 0])])
    follow(other, [make_stream("a", [0, 0, 0])])
    assert all(torch.equal(p, q) for p, q in zip(net.posteriors, other.posteriors))


def test_follow_blocks_merges_single_last_window():
    lengths = []

    def step(rows):
        lengths.append(len(rows))
        return torch.eye(3)[rows[:, 0].long()]

    y = torch.tensor([0, 1, 2, 0, 1])
    for n, block, expected in ((5, 2, [2, 3]), (5, 3, [3, 2]), (3, 1, [1, 1, 1])):
        lengths.clear()
        out = follow_blocks(step, make_stream("a", y[:n].tolist(), y[:n, None].float()), block)
        assert lengths == expected
        assert out.values.tolist() == [1] * n


def test_foreign_windows_are_predicted_but_not_scored():
    out = follow(Counting(), [make_stream("a", [0, FOREIGN, 2, 1])])[0]
    got = score(out)
    assert (got.n, got.accuracy) == (3, pytest.approx(2 / 3))
    assert np.isnan([out.nll[1], out.values[1]]).all()


@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(0, 99))
def test_score_matches_definitions(y, seed):
    g = torch.Generator().manual_seed(seed)
    outputs = torch.randn(len(y), 4, generator=g)
    got = score(ClassTrace.of_logits(make_stream("a", y), outputs))
    predicted = outputs.argmax(1).tolist()
    weights = [0.99 ** (len(y) - 1 - i) for i in range(len(y))]
    correct = [a == b for a, b in zip(y, predicted)]
    assert got.accuracy == pytest.approx(sum(correct) / len(y))
    assert got.faded_accuracy == pytest.approx(sum(w * r for w, r in zip(weights, correct)) / sum(weights))
    f1 = []
    for c in set(y) | set(predicted):
        tp, fp, fn = (
            sum(w for w, a, b in zip(weights, y, predicted) if (a == c, b == c) == kind)
            for kind in ((True, True), (False, True), (True, False))
        )
        f1.append(2 * tp / (2 * tp + fp + fn))
    assert got.faded_f1 == pytest.approx(sum(f1) / len(f1))
    assert got.macro_f1 == pytest.approx(f1_score(y, predicted, average="macro", zero_division=0))
    assert got.nll == pytest.approx(float(nn.functional.cross_entropy(outputs.double(), torch.tensor(y))))


def test_calibration_error_matches_torchmetrics():
    classification = pytest.importorskip("torchmetrics.functional.classification")
    g = torch.Generator().manual_seed(0)
    outputs, y = 2 * torch.randn(500, 4, generator=g), torch.randint(4, (500,), generator=g)
    got = score(ClassTrace.of_logits(make_stream("a", y.tolist()), outputs)).ece
    expected = classification.multiclass_calibration_error(outputs.softmax(1), y, num_classes=4, n_bins=15)
    assert got == pytest.approx(float(expected), abs=1e-6)
    assert calibration_error(np.full(4, 1.0), np.ones(4)) == 0
    # .30 and .36 are in different bins (edge at 5/15), so their errors of opposite sign do not cancel; .34 and .39 do.
    for confidence, expected in (([0.30, 0.36], (0.70 + 0.36) / 2), ([0.34, 0.39], (0.66 - 0.39) / 2)):
        assert calibration_error(np.array(confidence), np.array([1.0, 0.0])) == pytest.approx(expected)


@given(st.lists(st.sampled_from([0.0, 1.0, math.nan]), min_size=1, max_size=30), st.floats(0.5, 1.0))
def test_fading_mean_matches_explicit_sum(values, factor):
    values = [1.0, *values]
    got = fading_mean(np.array(values), factor)
    for t in range(len(values)):
        pairs = [(factor ** (t - i), v) for i, v in enumerate(values[: t + 1]) if not math.isnan(v)]
        assert got[t] == pytest.approx(sum(w * v for w, v in pairs) / sum(w for w, _ in pairs))


def test_worst_decile_and_harmed():
    assert worst_decile([i / 20 for i in range(20)]) == pytest.approx((0 + 1 / 20) / 2)
    assert worst_decile([0.3, 0.4]) == 0.3
    # A loss of exactly one percentage point is not harm.
    assert harmed([0.89, 0.88, 0.95], [0.90, 0.90, 0.90]) == pytest.approx(1 / 3)


def test_regret_is_zero_for_oracle_and_one_for_source():
    worse = trace([0, 0, 0, 0])
    base, best = [trace([1, 0, 0, 0])], [trace([1, 1, 1, 0])]
    assert regret(best, base, best) == 0
    assert regret(base, base, best) == 1
    assert regret([worse], base, best) == pytest.approx(1.5)
    assert math.isnan(regret(base, base, base))
    with pytest.raises(ValueError, match="different streams"):
        regret([trace([1, 0, 0, 0], digest="e")], base, best)


def test_windows_to_close_counts_windows_or_is_censored():
    base, best, rule = ([trace([0] * n + [1] * (400 - n))] for n in (400, 0, 100))
    # The mean of the last 50 windows reaches one half when 25 of them are correct.
    assert windows_to_close(0.5, rule, base, best) == 125
    assert windows_to_close(1.0, rule, base, best) == 150
    assert windows_to_close(0.5, best, base, best) == 50
    assert windows_to_close(0.5, base, base, best) is None
    # Reached, but not for fifty windows.
    assert windows_to_close(0.9, [trace([0] * 100 + [1] * 60 + [0] * 240)], base, best) is None
    assert windows_to_close(0.5, rule, best, base) is None
    assert windows_to_close(0.5, [trace([1] * 9)], [trace([0] * 9)], [trace([1] * 9)]) is None


def test_windows_to_close_measures_gap_from_source():
    base, best, rule = ([trace(c)] for c in ([1, 0] * 200, [1] * 400, [1, 0] * 50 + [1, 1, 0, 1] * 75))
    # Source one half, rule three quarters: half of the gap is closed; 0.4 of the oracle is reached immediately.
    assert windows_to_close(0.4, rule, base, best) > 100
    assert windows_to_close(0.6, rule, base, best) is None


def test_windows_to_close_averages_users_on_same_windows():
    base, best, rule = ([trace([a] * 300), trace([b] * 120, digest="e")] for a, b in ((0, 0), (1, 1), (1, 0)))
    assert windows_to_close(0.5, rule, base, best) == 50
    # After 120 the errors of the second user leave the mean; 50 of 55 windows are correct when five of them are left.
    assert windows_to_close(0.9, rule, base, best) == 120 - 5 + 50


def test_oracles_use_whole_stream_or_balanced_part():
    net, g = network(), torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 2, generator=g) * 3 + 2, torch.tensor([0] * 30 + [1] * 10)
    s, before = make_stream("a", y.tolist(), x), clone(net.state_dict())
    expected = ClassTrace.of_logits(s, logits(recalibrate(copy.deepcopy(net), x), x))
    np.testing.assert_array_equal(own_stream_oracle(net, s).nll, expected.nll)
    np.testing.assert_array_equal(source_baseline(net, s).nll, ClassTrace.of_logits(s, net(x)).nll)
    got = balanced_oracle(net, s, seed=0)
    assert not np.array_equal(got.nll, expected.nll)
    assert same(before, net.state_dict())
    even = make_stream("a", [0, 1] * 20, x)
    np.testing.assert_allclose(balanced_oracle(net, even, 0).nll, own_stream_oracle(net, even).nll, rtol=1e-5)


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=40).filter(lambda y: max(y) >= 0), st.integers(1, 9))
def test_balanced_rows_are_balanced(y, limit):
    labels = torch.tensor(y)
    rows = balanced_rows(labels, torch.Generator().manual_seed(0), limit)
    assert len(set(rows.tolist())) == len(rows)
    counts = {c: (labels[rows] == c).sum().item() for c in set(y) - {FOREIGN}}
    rarest = min(y.count(c) for c in counts)
    assert set(counts.values()) == {min(rarest, limit)}
    assert len(rows) == sum(counts.values())


def test_cost_excludes_warm_up():
    t = trace([1] * 20)
    slow = ClassTrace(t.user, t.digest, t.y, t.predicted, t.confidence, t.nll, np.array([1.0] * 10 + [2e-6] * 10))
    got = cost([slow], 12.0)
    assert (got.us_p50, got.us_p99, got.bytes_per_user) == (pytest.approx(2), pytest.approx(2), 12)


def test_metric_with_state_does_not_commit():
    net = Counting()
    net.counts["a"] = 1
    data = Examples(torch.zeros(5, 2), torch.tensor([1, 1, 0, 1, 2]), torch.zeros(5))
    assert metric_with_state(net, "a", data, chunk=2) == pytest.approx(3 / 5)
    assert {kind for kind, _ in net.calls} == {"predict"}


def test_judge_alarms_matches_alarms_to_changes():
    got = judge_alarms([10, 103, 104, 250, 460], [100, 200, 300, 450], n=500, patience=40)
    assert (got.delays, got.missed, got.false_per_1000) == ((3, 10), 2, pytest.approx(1000 * 2 / 500))
    assert judge_alarms([7], [], n=100).false_per_1000 == 10


def test_judge_alarms_at_the_limits():
    at_change = judge_alarms([100], [100], n=500, patience=40)
    assert (at_change.delays, at_change.missed, at_change.false_per_1000) == ((0,), 0, 0)
    before, last, late = (judge_alarms([100 + d], [100], n=500, patience=40) for d in (-1, 39, 40))
    assert (before.delays, last.delays, late.delays) == ((), (39,), ())
    assert [j.false_per_1000 for j in (before, last, late)] == [2, 0, 2]
    # An alarm at the next change belongs to that change.
    assert judge_alarms([120], [100, 120], n=500, patience=40).delays == (0,)
    assert judge_alarms([120], [100, 120], n=500, patience=40).missed == 1
    assert judge_alarms([499], [490], n=495).delays == ()


@pytest.mark.parametrize("text", ["pseudo:n0=4", "ema:rate=0.1", "dabn", "class-mixture"])
def test_follow_personalized_matches_single_users(text):
    g = torch.Generator().manual_seed(0)
    net = network()
    x, y = torch.randn(60, 2, generator=g), torch.arange(60) % 3
    prior = source_prior(net, x, y, 3)
    users = (("a", 20), ("b", 13))
    streams = [make_stream(u, y[:n].tolist(), torch.randn(n, 2, generator=g) * 2 + 1) for u, n in users]
    for a, s in zip(follow(personalize(net, text, prior=prior), streams), streams):
        (b,) = follow(personalize(net, text, prior=prior), [s])
        np.testing.assert_allclose(a.nll, b.nll, rtol=1e-4, atol=1e-5)
        assert not np.allclose(a.nll, source_baseline(net, s).nll, rtol=1e-2)
