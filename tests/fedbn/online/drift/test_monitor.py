from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.online import personalize
from fedbn.online.drift.actions import Branch, Decay, Reset, UserMonitor, action
from fedbn.online.drift.detectors import detector
from fedbn.online.drift.monitor import DriftMonitor
from fedbn.online.drift.signal import GroupStatistics, InputMeans
from fedbn.online.prequential import follow
from fedbn.online.prequential_metrics import judge_alarms
from fedbn.streams import Event, Stream


@dataclass(frozen=True)
class CountingState:
    """A state with a name and a number of windows."""

    name: str
    n: float

    def decay(self, factor):
        return replace(self, n=self.n * factor)


class CountingNet:
    """Predicts a class by the sign of the first value. Its states count windows."""

    def __init__(self):
        self.states, self.calls, self.last = {}, [], []

    def predict(self, x, user):
        self.last = list(user)
        labels = (x[:, 0].flatten(1).mean(1) > 0).long()
        return 20.0 * nn.functional.one_hot(labels, 2).float()

    def commit(self, posterior=None):
        for u in self.last:
            old = self.state(u)
            self.states[u] = CountingState(old.name, old.n + 1)

    def state(self, user):
        return self.states.get(user, CountingState("source", 0))

    def load(self, user, state):
        self.calls.append(("load", user, state))
        self.states[user] = state

    def reset(self, user):
        self.calls.append(("reset", user))
        self.states.pop(user, None)


def model():
    torch.manual_seed(0)
    layers = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Flatten()
    return nn.Sequential(*layers).eval().requires_grad_(False)


def recording(n, offset, seed=0):
    """Windows ``[n, 2, 8]`` in bouts of twenty. The first channel shows the class, the second the person."""
    g = torch.Generator().manual_seed(seed)
    y = (torch.arange(n) // 20) % 2
    x = 0.3 * torch.randn(n, 2, 8, generator=g)
    x[:, 0] += (4.0 * y - 2)[:, None]
    x[:, 1] += offset + 0.3 * torch.randn(n, 1, generator=g)
    return x, y


def stream(*parts, user="ann"):
    x, y = (torch.cat(side) for side in zip(*parts))
    at = torch.tensor([len(p[1]) for p in parts]).cumsum(0)[:-1].tolist()
    return Stream(user, x, y, torch.zeros(len(y), dtype=torch.int64), tuple(Event(a, "switch") for a in at))


def monitored(detector_text="adwin", action_text="decay"):
    net = CountingNet()
    return net, DriftMonitor(net, model(), detector(detector_text), action(action_text))


def followed(text, *parts):
    """The network and the monitor of ann, with action ``text``, after a stream of these recordings."""
    net, monitor = monitored(action_text=text)
    follow(monitor, [stream(*parts)])
    return net, monitor.users["ann"]


def test_input_means_are_those_of_the_first_layers():
    net, x = model(), torch.randn(5, 2, 8)
    expected = torch.cat([net[0](x).mean(2), net[:3](x).mean(2)], 1).double()
    torch.testing.assert_close(InputMeans(net)(x), expected)
    torch.testing.assert_close(InputMeans(net, 1)(x), expected[:, :3])
    flat = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    torch.testing.assert_close(InputMeans(flat)(x[:, :, 0]), flat[0](x[:, :, 0]).double().detach())


def test_distance_is_about_one_without_drift():
    statistics = GroupStatistics(2, np.ones(4))
    rows = np.random.default_rng(0).normal(size=(4000, 4)) * [1.0, 2, 3, 4] + 5
    for i, row in enumerate(rows[:2000]):
        assert (statistics.distance(row, 0) is None) == (i < 8)
        statistics.update(row[None], [0])
    np.testing.assert_allclose(statistics.mean[0], rows[:2000].mean(0))
    np.testing.assert_allclose(statistics.m2[0] / 1999, rows[:2000].var(0, ddof=1))
    z = [statistics.distance(row, 0) for row in rows[2000:]]
    assert sum(z) / len(z) == pytest.approx(1, abs=0.05)
    assert statistics.distance(rows[0], 1) is None


def test_distance_has_variance_floor_of_the_source():
    statistics = GroupStatistics(1, np.array([4.0]))
    for _ in range(10):
        statistics.update(np.zeros((1, 1)), [0])
    assert statistics.distance(np.ones(1), 0) == pytest.approx(1 / 4e-3)


@pytest.mark.parametrize("text", ["adwin", "page-hinkley"])
def test_monitor_detects_switches_but_not_bouts(text):
    _, calm = monitored(text)
    follow(calm, [stream(recording(600, 0.0))])
    assert not calm.users["ann"].alarms
    _, switched = monitored(text)
    s = stream(recording(200, 0.0), recording(200, 3.0, seed=1))
    follow(switched, [s])
    judged = judge_alarms(switched.users["ann"].alarms, [e.at for e in s.events], len(s), patience=60)
    assert (judged.missed, judged.false_per_1000) == (0, 0)
    assert judged.delays[0] < 40


def test_monitor_keeps_users_separate():
    net, both = monitored()
    moved = stream(recording(200, 0.0), recording(100, 3.0, seed=1), user="bob")
    follow(both, [stream(recording(300, 0.0)), moved])
    assert not both.users["ann"].alarms
    assert both.users["bob"].alarms
    assert {user for _, user, *_ in net.calls} == {"bob"}


def test_decay_limits_weight_and_never_raises_it():
    net, ann = followed("decay:n=16", recording(200, 0.0), recording(100, 3.0, seed=1))
    assert net.calls[0][2].n == pytest.approx(16)
    assert net.state("ann").n == pytest.approx(16 + 300 - ann.alarms[0])
    few = CountingNet()
    few.states["ann"] = CountingState("ann", 5)
    Decay().apply(few, "ann", ann)
    assert few.state("ann").n == 5


def test_reset_returns_to_the_source():
    net, ann = followed("reset", recording(200, 0.0), recording(100, 3.0, seed=1))
    assert net.calls == [("reset", "ann")]
    assert net.state("ann").n == 300 - ann.alarms[0]


def test_branch_restores_statistics_of_returning_person():
    net, ann = followed("branch", *(recording(200, offset, seed) for seed, offset in enumerate((0.0, 3.0, 0.0))))
    assert [kind for kind, *_ in net.calls] == ["reset", "load"]
    first, second = ann.alarms
    assert 200 < first < 260 < 400 < second < 460
    assert net.calls[1][2].n == first
    assert len(ann.saved) == 1


def test_branch_resets_if_nothing_fits_and_limits_saved():
    net, ann = followed("branch:most=1", *(recording(200, 3.0 * i, seed=i) for i in range(4)))
    assert [kind for kind, *_ in net.calls] == ["reset"] * 3
    assert len(ann.saved) == 1


def test_monitor_without_drift_changes_no_prediction():
    s = stream(recording(100, 0.0))
    plain = follow(CountingNet(), [s])[0]
    _, monitor = monitored()
    assert (follow(monitor, [s])[0].nll == plain.nll).all()


def test_monitor_commit_requires_predict():
    with pytest.raises(ValueError, match="call predict.. first"):
        monitored()[1].commit(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (detector, "adwn", "unknown drift detector 'adwn'. Did you mean 'adwin'?"),
        (action, "decay:n=-1", "action 'decay': n must not be negative, it is -1"),
        (action, "branch:most=0", "action 'branch': most must be at least 1, not 0"),
        (action, "forget", "unknown action on drift 'forget'"),
    ],
)
def test_drift_options_reject_bad_input(parse, text, message):
    with pytest.raises(UserError) as error:
        parse(text)
    assert message in str(error.value)


def test_input_means_reject_model_without_statistics():
    with pytest.raises(UserError, match="drift detection works on running statistics"):
        InputMeans(nn.Linear(2, 2))


def test_detector_reports_missing_river(monkeypatch):
    monkeypatch.setitem(sys.modules, "river", None)
    with pytest.raises(UserError, match=r"drift detection needs river: pip install 'fedbn\[online\]'"):
        detector("adwin")


def test_action_parses_every_name():
    assert [type(action(n)) for n in ("decay", "reset", "branch")] == [Decay, Reset, Branch]


def test_actions_work_on_a_personalized_model():
    net = personalize(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3)).eval(), "pseudo:n0=4")
    for _ in range(30):
        net(torch.randn(1, 2) + 5, user=["ann"])
    before = net.state("ann")
    input_means = InputMeans(model())
    statistics = GroupStatistics(2, input_means.scale.numpy())
    row = input_means(torch.randn(1, 2, 8)).numpy()
    for _ in range(10):
        statistics.update(row, [0])
    monitor = UserMonitor(detector("adwin"), statistics, recent=[(row[0] + 100, 0)])
    Branch().apply(net, "ann", monitor)
    assert net.state("ann").n == 0
    monitor.recent = [(row[0], 0)]
    Branch().apply(net, "ann", monitor)
    assert net.state("ann").n == before.n == 30
    Decay(8).apply(net, "ann", monitor)
    assert net.state("ann").n == pytest.approx(8)
    old, new = (s.layers["0"] for s in (before, net.state("ann")))
    torch.testing.assert_close(new.mean, old.mean)
