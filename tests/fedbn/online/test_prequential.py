from __future__ import annotations

import copy
import math

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
from fedbn.online import personalize, rule, source_prior
from fedbn.online.prequential import (
    Ask,
    Trace,
    accuracy_with_state,
    balanced,
    balanced_oracle,
    follow,
    follow_blocks,
    own_stream_oracle,
    source,
)
from fedbn.online.prequential_metrics import (
    calibration_error,
    cost,
    faded,
    harmed,
    judge_alarms,
    regret,
    score,
    windows_to_close,
    worst_decile,
)
from fedbn.statistics.recalibration import recalibrate
from fedbn.streams import FOREIGN, Stream


class Counting:
    """Answers with how often it has been told something by this user before; any class may be the wanted one."""

    def __init__(self, classes=3):
        self.met, self.last, self.calls, self.classes = {}, [], [], classes

    def predict(self, x, user):
        self.last = list(user)
        self.calls.append(("predict", tuple(user)))
        return torch.stack(
            [10.0 * nn.functional.one_hot(torch.tensor(self.met.get(u, 0) % self.classes), self.classes) for u in user]
        )

    def commit(self, posterior=None):
        assert torch.allclose(posterior.sum(1), torch.ones(len(self.last)))
        self.calls.append(("commit", tuple(self.last)))
        for u in self.last:
            self.met[u] = self.met.get(u, 0) + 1


def made(user, y, x=None):
    y = torch.tensor(y)
    return Stream(user, torch.zeros(len(y), 2) if x is None else x, y, torch.zeros(len(y), dtype=torch.int64))


def trace(correct, user="a", digest="d"):
    """A trace that is right where told; None where a window is not scored."""
    y = np.array([FOREIGN if c is None else 1 for c in correct])
    predicted = np.array([1 if c else 0 for c in correct])
    n = len(correct)
    return Trace(user, digest, y, predicted, np.full(n, 0.5), np.where(y == FOREIGN, np.nan, 0.7), np.full(n, 1e-6))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).eval()


def test_each_window_is_predicted_before_it_is_learnt_from_and_streams_of_any_length_go_side_by_side():
    net = Counting()
    a, b = follow(net, [made("a", [0, 1, 2, 0]), made("b", [0, 1])])
    assert net.calls[0] == ("predict", ("a", "b"))
    assert net.calls[1] == ("commit", ("a", "b"))
    assert net.calls[-1] == ("commit", ("a",))
    assert a.predicted.tolist() == [0, 1, 2, 0]
    assert b.predicted.tolist() == [0, 1]
    assert score(a).accuracy == 1
    assert (a.seconds > 0).all()


def test_side_by_side_equals_one_by_one():
    streams = [made("a", [0, 0, 1]), made("b", [2, 1, 0, 1, 0])]
    together = follow(Counting(), streams)
    alone = [follow(Counting(), [s])[0] for s in streams]
    for one, other in zip(together, alone):
        assert one.predicted.tolist() == other.predicted.tolist()
        np.testing.assert_array_equal(one.nll, other.nll)


def test_a_user_has_one_stream():
    with pytest.raises(ValueError, match="one stream a user"):
        follow(Counting(), [made("a", [0]), made("a", [1])])


class Recording(Counting):
    """Remembers what it was told to learn from; always predicts class 0."""

    def __init__(self):
        super().__init__()
        self.told = []

    def predict(self, x, user):
        self.last = list(user)
        return torch.tensor([[2.0, 0, 0]]).repeat(len(x), 1)

    def commit(self, posterior=None):
        self.told.append(posterior)


def test_questions_are_asked_about_what_was_confirmed_least_and_within_the_budget():
    net = Recording()
    follow(net, [made("a", [1, 2, 0, 0, 1]), made("b", [FOREIGN, 0, 1])], Ask(budget=3))
    told = [rows.argmax(1).tolist() for rows in net.told]
    sure = [(rows.amax(1) == 1).tolist() for rows in net.told]
    # a: 1, 2 and 0 are confirmed, then the budget is spent. b: the foreign window is nobody's to confirm; once 0 is
    # confirmed it is not asked about again while the others are not.
    assert [s[0] for s in sure] == [True, True, True, False, False]
    assert [t[0] for t in told] == [1, 2, 0, 0, 0]
    assert [s[1] for s in sure[:3]] == [False, True, False]


def test_no_label_is_seen_unless_asked_for():
    net, one = Recording(), Recording()
    follow(net, [made("a", [1, 2, 0])])
    follow(one, [made("a", [0, 0, 0])])
    assert all(torch.equal(p, q) for p, q in zip(net.told, one.told))


def test_blocks_come_in_order_and_a_lone_last_window_joins_those_before():
    lengths = []

    def step(rows):
        lengths.append(len(rows))
        return torch.eye(3)[rows[:, 0].long()]

    x = torch.tensor([[0.0, 0], [1, 0], [2, 0], [0, 0], [1, 0]])
    out = follow_blocks(step, made("a", [0, 1, 2, 0, 1], x), block=2)
    assert lengths == [2, 3]
    assert out.correct.tolist() == [1] * 5
    lengths.clear()
    follow_blocks(step, made("a", [0, 1, 2, 0, 1], x), block=3)
    assert lengths == [3, 2]
    lengths.clear()
    follow_blocks(step, made("a", [0, 1, 2], x[:3]), block=1)
    assert lengths == [1, 1, 1]


def test_foreign_windows_are_followed_and_never_scored():
    out = follow(Counting(), [made("a", [0, FOREIGN, 2, 1])])[0]
    got = score(out)
    assert (got.n, got.accuracy) == (3, pytest.approx(2 / 3))
    assert math.isnan(out.nll[1])
    assert math.isnan(out.correct[1])


@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(0, 99))
def test_scores_against_their_definitions(y, seed):
    g = torch.Generator().manual_seed(seed)
    outputs = torch.randn(len(y), 4, generator=g)
    got = score(Trace.of(made("a", y), outputs))
    said = outputs.argmax(1).tolist()
    weights = [0.99 ** (len(y) - 1 - i) for i in range(len(y))]
    right = [a == b for a, b in zip(y, said)]
    assert got.accuracy == pytest.approx(sum(right) / len(y))
    assert got.faded_accuracy == pytest.approx(sum(w * r for w, r in zip(weights, right)) / sum(weights))
    f1 = []
    for c in set(y) | set(said):
        tp, fp, fn = (
            sum(w for w, a, b in zip(weights, y, said) if (a == c, b == c) == kind)
            for kind in ((True, True), (False, True), (True, False))
        )
        f1.append(2 * tp / (2 * tp + fp + fn))
    assert got.faded_f1 == pytest.approx(sum(f1) / len(f1))
    assert got.macro_f1 == pytest.approx(f1_score(y, said, average="macro", zero_division=0))
    assert got.nll == pytest.approx(float(nn.functional.cross_entropy(outputs.double(), torch.tensor(y))))


def test_calibration_error_agrees_with_torchmetrics():
    classification = pytest.importorskip("torchmetrics.functional.classification")
    g = torch.Generator().manual_seed(0)
    outputs, y = 2 * torch.randn(500, 4, generator=g), torch.randint(4, (500,), generator=g)
    got = score(Trace.of(made("a", y.tolist()), outputs)).ece
    wanted = classification.multiclass_calibration_error(outputs.softmax(1), y, num_classes=4, n_bins=15)
    assert got == pytest.approx(float(wanted), abs=1e-6)
    assert calibration_error(np.full(4, 1.0), np.ones(4)) == 0
    # .30 and .36 lie on either side of the edge at 5/15: their errors of opposite sign do not cancel.
    assert calibration_error(np.array([0.30, 0.36]), np.array([1.0, 0.0])) == pytest.approx((0.70 + 0.36) / 2)
    # .34 and .39 lie between 5/15 and 6/15: they do.
    assert calibration_error(np.array([0.34, 0.39]), np.array([1.0, 0.0])) == pytest.approx((0.66 - 0.39) / 2)


@given(st.lists(st.sampled_from([0.0, 1.0, math.nan]), min_size=1, max_size=30), st.floats(0.5, 1.0))
def test_fading_mean_against_its_sum(values, factor):
    values = [1.0, *values]
    got = faded(np.array(values), factor)
    for t in range(len(values)):
        pairs = [(factor ** (t - i), v) for i, v in enumerate(values[: t + 1]) if not math.isnan(v)]
        assert got[t] == pytest.approx(sum(w * v for w, v in pairs) / sum(w for w, _ in pairs))


def test_who_is_worst_and_who_is_harmed():
    assert worst_decile([i / 20 for i in range(20)]) == pytest.approx((0 + 1 / 20) / 2)
    assert worst_decile([0.3, 0.4]) == 0.3
    # Exactly a point is not more than a point.
    assert harmed([0.89, 0.88, 0.95], [0.90, 0.90, 0.90]) == pytest.approx(1 / 3)


def test_regret_is_zero_at_the_oracle_one_at_the_source_and_above_for_harm():
    worse = trace([0, 0, 0, 0])
    base, best = [trace([1, 0, 0, 0])], [trace([1, 1, 1, 0])]
    assert regret(best, base, best) == 0
    assert regret(base, base, best) == 1
    assert regret([worse], base, best) == pytest.approx(1.5)
    assert math.isnan(regret(base, base, base))
    with pytest.raises(ValueError, match="different streams"):
        regret([trace([1, 0, 0, 0], digest="e")], base, best)


def test_windows_to_close_counts_from_the_start_and_reports_censoring():
    n = 400
    base, best = [trace([0] * n)], [trace([1] * n)]
    rule = [trace([0] * 100 + [1] * 300)]
    # The mean of the last 50 windows reaches one half when 25 of them are right.
    assert windows_to_close(0.5, rule, base, best) == 125
    assert windows_to_close(1.0, rule, base, best) == 150
    assert windows_to_close(0.5, best, base, best) == 50
    assert windows_to_close(0.5, base, base, best) is None
    # Reached, but not held for fifty windows.
    assert windows_to_close(0.9, [trace([0] * 100 + [1] * 60 + [0] * 240)], base, best) is None
    assert windows_to_close(0.5, rule, best, base) is None
    assert windows_to_close(0.5, [trace([1] * 9)], [trace([0] * 9)], [trace([1] * 9)]) is None


def test_the_gap_starts_at_the_source():
    n = 400
    base, best = [trace([1, 0] * 200)], [trace([1] * n)]
    rule = [trace([1, 0] * 50 + [1, 1, 0, 1] * 75)]
    # Source one half, rule three quarters: half of the gap is closed. Of the oracle 0.4 was there at once.
    assert windows_to_close(0.4, rule, base, best) > 100
    assert windows_to_close(0.6, rule, base, best) is None


def test_the_gap_is_between_means_over_users_on_the_same_windows():
    base = [trace([0] * 300), trace([0] * 120, digest="e")]
    best = [trace([1] * 300), trace([1] * 120, digest="e")]
    rule = [trace([1] * 300), trace([0] * 120, digest="e")]
    assert windows_to_close(0.5, rule, base, best) == 50
    # After 120 the second one's errors leave the mean; 50 of 55 windows are right when five of them are left.
    assert windows_to_close(0.9, rule, base, best) == 120 - 5 + 50


def test_bounds_are_statistics_of_the_whole_stream_and_of_a_balanced_part():
    net, g = network(), torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 2, generator=g) * 3 + 2, torch.tensor([0] * 30 + [1] * 10)
    s, before = made("a", y.tolist(), x), clone(net.state_dict())
    expected = recalibrate(copy.deepcopy(net), x)
    wanted = Trace.of(s, logits(expected, x))
    np.testing.assert_array_equal(own_stream_oracle(net, s).nll, wanted.nll)
    np.testing.assert_array_equal(source(net, s).nll, Trace.of(s, net(x)).nll)
    got = balanced_oracle(net, s, seed=0)
    assert not np.array_equal(got.nll, wanted.nll)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    even = made("a", [0, 1] * 20, x)
    np.testing.assert_allclose(balanced_oracle(net, even, 0).nll, own_stream_oracle(net, even).nll, rtol=1e-5)


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=40).filter(lambda y: max(y) >= 0), st.integers(1, 9))
def test_a_balanced_choice_is_balanced(y, most):
    labels = torch.tensor(y)
    rows = balanced(labels, torch.Generator().manual_seed(0), most)
    assert len(set(rows.tolist())) == len(rows)
    counts = {c: (labels[rows] == c).sum().item() for c in set(y) - {FOREIGN}}
    rarest = min(y.count(c) for c in counts)
    assert set(counts.values()) == {min(rarest, most)}
    assert len(rows) == sum(counts.values())


def test_cost_leaves_out_the_warm_up():
    t = trace([1] * 20)
    slow = Trace(t.user, t.digest, t.y, t.predicted, t.confidence, t.nll, np.array([1.0] * 10 + [2e-6] * 10))
    got = cost([slow], 12.0)
    assert (got.us_p50, got.us_p99, got.bytes_per_user) == (pytest.approx(2), pytest.approx(2), 12)


def test_accuracy_with_a_users_state_learns_nothing():
    net = Counting()
    net.met["a"] = 1
    data = Examples(torch.zeros(5, 2), torch.tensor([1, 1, 0, 1, 2]), torch.zeros(5))
    assert accuracy_with_state(net, "a", data, chunk=2) == pytest.approx(3 / 5)
    assert {kind for kind, _ in net.calls} == {"predict"}


def test_alarms_are_matched_with_changes():
    got = judge_alarms([10, 103, 104, 250, 460], [100, 200, 300, 450], n=500, patience=40)
    assert got.delays == (3, 10)
    assert got.missed == 2
    assert got.false_per_1000 == pytest.approx(1000 * 2 / 500)
    assert judge_alarms([7], [], n=100).false_per_1000 == 10


@pytest.mark.parametrize("text", ["pseudo:n0=4", "ema:rate=0.1", "dabn", "class-mixture"])
def test_the_bank_follows_many_as_it_follows_one(text):
    g = torch.Generator().manual_seed(0)
    net = network()
    x, y = torch.randn(60, 2, generator=g), torch.arange(60) % 3
    prior = source_prior(net, x, y, 3)
    streams = [made(u, y[:n].tolist(), torch.randn(n, 2, generator=g) * 2 + 1) for u, n in (("a", 20), ("b", 13))]
    together = follow(personalize(net, rule(text), prior=prior), streams)
    alone = [follow(personalize(net, rule(text), prior=prior), [s])[0] for s in streams]
    for one, other, s in zip(together, alone, streams):
        np.testing.assert_allclose(one.nll, other.nll, rtol=1e-4, atol=1e-5)
        assert not np.allclose(one.nll, source(net, s).nll, rtol=1e-2)
