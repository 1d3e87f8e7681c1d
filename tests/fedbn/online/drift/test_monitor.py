from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.online import personalize, rule
from fedbn.online.drift.actions import Branch, Decay, Reset, UserMonitor, action
from fedbn.online.drift.detectors import detector
from fedbn.online.drift.monitor import DriftMonitor
from fedbn.online.drift.signal import ChannelMeans, Context
from fedbn.online.prequential import follow
from fedbn.online.prequential_metrics import judge_alarms
from fedbn.streams import Event, Stream


@dataclass(frozen=True)
class Worth:
    """A state that is told apart by name and knows how many windows it is worth."""

    name: str
    n: float

    def decay(self, factor):
        return replace(self, n=self.n * factor)


class Net:
    """Predicts a class by the sign of the first value; its states count windows."""

    def __init__(self):
        self.states, self.done, self.last = {}, [], []

    def predict(self, x, user):
        self.last = list(user)
        right = (x[:, 0].flatten(1).mean(1) > 0).long()
        return 20.0 * nn.functional.one_hot(right, 2).float()

    def commit(self, posterior=None):
        for u in self.last:
            old = self.state(u)
            self.states[u] = Worth(old.name, old.n + 1)

    def state(self, user):
        return self.states.get(user, Worth("source", 0))

    def load(self, user, state):
        self.done.append(("load", user, state))
        self.states[user] = state

    def reset(self, user):
        self.done.append(("reset", user))
        self.states.pop(user, None)


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Flatten()
    ).eval()


def person(n, offset, seed=0):
    """Windows ``[n, 2, 8]`` in bouts of twenty: the first channel tells the class, the second the person."""
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


def watched(notice="adwin", act="decay"):
    net = Net()
    return net, DriftMonitor(net, model(), detector(notice), action(act))


def test_the_look_is_the_channel_means_at_the_first_layers_under_the_source():
    net, x = model(), torch.randn(5, 2, 8)
    first = net[0](x)
    second = net[2](net[1](first))
    wanted = torch.cat([first.mean(2), second.mean(2)], 1).double()
    torch.testing.assert_close(ChannelMeans(net)(x), wanted.detach())
    torch.testing.assert_close(ChannelMeans(net, 1)(x), wanted[:, :3].detach())
    flat = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    torch.testing.assert_close(ChannelMeans(flat)(x[:, :, 0]), flat[0](x[:, :, 0]).double().detach())


def test_the_distance_is_about_one_for_more_of_the_same_and_undefined_for_little_known_classes():
    g = torch.Generator().manual_seed(0)
    context = Context(torch.ones(4, dtype=torch.float64))
    rows = torch.randn(4000, 4, generator=g, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 4]) + 5
    for i, row in enumerate(rows[:2000]):
        assert (context.distance(row, 0) is None) == (i < 8)
        context.learn(row, 0)
    torch.testing.assert_close(context.mean[0], rows[:2000].mean(0))
    torch.testing.assert_close(context.m2[0] / 1999, rows[:2000].var(0))
    z = [context.distance(row, 0) for row in rows[2000:]]
    assert sum(z) / len(z) == pytest.approx(1, abs=0.05)
    assert context.distance(rows[0], 1) is None


def test_what_hardly_varies_is_measured_by_the_source():
    context = Context(torch.tensor([4.0], dtype=torch.float64))
    for _ in range(10):
        context.learn(torch.zeros(1, dtype=torch.float64), 0)
    assert context.distance(torch.ones(1, dtype=torch.float64), 0) == pytest.approx(1 / 4e-3)


@pytest.mark.parametrize("notice", ["adwin", "page-hinkley"])
def test_bouts_alone_raise_no_alarm_and_a_switch_does(notice):
    _, calm = watched(notice)
    follow(calm, [stream(person(600, 0.0))])
    assert not calm.watches["ann"].alarms
    _, switched = watched(notice)
    s = stream(person(200, 0.0), person(200, 3.0, seed=1))
    follow(switched, [s])
    found = judge_alarms(switched.watches["ann"].alarms, [e.at for e in s.events], len(s), patience=60)
    assert found.missed == 0
    assert found.false_per_1000 == 0
    assert found.delays[0] < 40


def test_users_are_watched_apart():
    net, both = watched()
    moved = stream(person(200, 0.0), person(100, 3.0, seed=1), user="bob")
    follow(both, [stream(person(300, 0.0)), moved])
    assert not both.watches["ann"].alarms
    assert both.watches["bob"].alarms
    assert {user for _, user, *_ in net.done} == {"bob"}


def test_decay_leaves_at_most_so_many_windows_and_never_adds_any():
    net, switched = watched(act="decay:n=16")
    follow(switched, [stream(person(200, 0.0), person(100, 3.0, seed=1))])
    alarm = switched.watches["ann"].alarms[0]
    assert net.done[0][2].n == pytest.approx(16)
    assert net.state("ann").n == pytest.approx(16 + 300 - alarm)
    few = Net()
    few.states["ann"] = Worth("ann", 5)
    Decay().act(few, "ann", switched.watches["ann"])
    assert few.state("ann").n == 5


def test_reset_goes_back_to_the_source():
    net, switched = watched(act="reset")
    follow(switched, [stream(person(200, 0.0), person(100, 3.0, seed=1))])
    assert net.done == [("reset", "ann")]
    assert net.state("ann").n == 300 - switched.watches["ann"].alarms[0]


def test_branch_takes_out_what_it_put_aside_when_the_same_person_comes_back():
    net, switched = watched(act="branch")
    parts = [person(200, 0.0), person(200, 3.0, seed=1), person(200, 0.0, seed=2)]
    follow(switched, [stream(*parts)])
    kinds = [kind for kind, *_ in net.done]
    assert kinds == ["reset", "load"]
    first, second = switched.watches["ann"].alarms
    assert 200 < first < 260
    assert 400 < second < 460
    assert net.done[1][2].n == first
    assert len(switched.watches["ann"].aside) == 1


def test_branch_begins_anew_where_nothing_fits_and_keeps_so_many():
    net, switched = watched(act="branch:most=1")
    parts = [person(200, 3.0 * i, seed=i) for i in range(4)]
    follow(switched, [stream(*parts)])
    assert [kind for kind, *_ in net.done] == ["reset"] * 3
    assert len(switched.watches["ann"].aside) == 1


def test_being_watched_changes_no_answer_while_nothing_happens():
    s = stream(person(100, 0.0))
    plain = follow(Net(), [s])[0]
    _, same = watched()
    assert (follow(same, [s])[0].nll == plain.nll).all()


def test_commit_needs_a_predict():
    with pytest.raises(ValueError, match="commit follows a predict"):
        watched()[1].commit(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("make", "text", "message"),
    [
        (detector, "adwn", "unknown drift detector 'adwn'. Did you mean 'adwin'?"),
        (action, "decay:n=-1", "action 'decay': n must not be negative, it is -1"),
        (action, "branch:most=0", "action 'branch': most must be at least 1, not 0"),
        (action, "forget", "unknown action on drift 'forget'"),
    ],
)
def test_what_a_user_can_get_wrong(make, text, message):
    with pytest.raises(UserError) as error:
        make(text)
    assert message in str(error.value)


def test_a_model_without_statistics_cannot_be_watched():
    with pytest.raises(UserError, match="drift detection works on running statistics"):
        ChannelMeans(nn.Linear(2, 2))


def test_river_is_asked_for_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "river", None)
    with pytest.raises(UserError, match=r"drift detection needs river: pip install 'fedbn\[online\]'"):
        detector("adwin").new()


def test_actions_are_what_they_are_called():
    assert [type(action(n)) for n in ("decay", "reset", "branch")] == [Decay, Reset, Branch]


def test_decay_and_branch_act_on_the_bank():
    net = personalize(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3)).eval(), rule("pseudo:n0=4"))
    for _ in range(30):
        net(torch.randn(1, 2) + 5, user=["ann"])
    before = net.state("ann")
    watch = DriftMonitor(net, model(), detector("adwin"), action("branch"))
    context = Context(watch.look.scale)
    row = watch.look(torch.randn(1, 2, 8))[0]
    for _ in range(10):
        context.learn(row, 0)
    seen = UserMonitor(detector("adwin").new(), context, recent=[(row + 100, 0)])
    Branch().act(net, "ann", seen)
    assert net.state("ann").n == 0
    seen.recent = [(row, 0)]
    Branch().act(net, "ann", seen)
    assert net.state("ann").n == before.n == 30
    Decay(8).act(net, "ann", seen)
    assert net.state("ann").n == pytest.approx(8)
    old, new = (s.layers["0"] for s in (before, net.state("ann")))
    torch.testing.assert_close(new.mean, old.mean)
