"""Two people take turns on a device. Restoring a person's earlier statistics beats starting over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedbn.data.population import Examples
from fedbn.online import personalize
from fedbn.online.drift.monitor import DriftMonitor
from fedbn.online.prequential import follow
from fedbn.online.prequential_metrics import judge_alarms
from fedbn.streams import stream
from fedbn_simulations.adaptation.methods import adaptation_method

TURN = 80
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("recurring")]


def source():
    """Predicts the class from the sign of the first channel, for people without an offset."""
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(16, 2)).eval()
    net.requires_grad_(False)[0].running_var.copy_(torch.tensor([4.0, 1.0]))
    net[2].bias.zero_()
    net[2].weight.zero_()[:, :8] = torch.tensor([[-1.0], [1.0]])
    return net


def person(offset, seed):
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (4 * TURN,), generator=draw)
    moved = offset + 0.25 * torch.randn(4 * TURN, 2, 1, generator=draw)
    moved[:, 0] += (2.0 * y - 1)[:, None]
    return Examples(0.3 * torch.randn(4 * TURN, 2, 8, generator=draw) + moved, y, torch.zeros(4 * TURN))


@pytest.fixture(scope="module")
def followed():
    """The stream, and by action the accuracy of each turn and the alarms."""
    (recurring, _) = stream("recurring:visits=4").make_all(["ann", "bob"], [person(-1.5, 0), person(1.5, 1)], seed=0)
    results = {}
    for act in ("branch", "reset"):
        method = adaptation_method(f"pseudo:n0=16/page-hinkley/{act}")
        net = DriftMonitor(personalize(source(), method.rule), source(), *method.watch)
        (trace,) = follow(net, [recurring])
        results[act] = trace.values.reshape(-1, TURN).mean(1), net.users["ann"].alarms
    return recurring, results


@pytest.mark.slow
def test_drift_is_detected_at_every_switch_and_only_there(followed):
    recurring, results = followed
    for _, alarms in results.values():
        judged = judge_alarms(alarms, [e.at for e in recurring.events], len(recurring))
        assert (judged.missed, judged.false_per_1000) == (0, 0)
        assert max(judged.delays) < 10


def test_branch_beats_reset_when_a_person_returns(followed):
    _, results = followed
    (branch, _), (reset, _) = results["branch"], results["reset"]
    assert branch[:2] == pytest.approx(reset[:2]), "no person has returned yet"
    assert branch[2:].mean() > reset[2:].mean() + 0.03
    assert branch[2:].min() > 0.93
