"""What a state gives away, measured by attack, and how far each control goes against it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.models.har_cnn import HarCNN
from fedbn.online import personalize, rule
from fedbn.online.prior import layer_priors
from fedbn.online.release import Release, reidentified, window_between

FIRST, LAST = "features.1", "features.9"
CLIPPED = "pseudo:clip=3"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = HarCNN((6, 32), 4).train()
    for _ in range(40):
        net(torch.randn(64, 6, 32) * torch.rand(64, 6, 1) * 2 + torch.randn(64, 6, 1))
    return net.eval()


def people(n=24, windows=60, session=0):
    """Windows ``[windows, 6, 32]`` of n people, each with an offset and a gain of their own for good."""
    own = torch.Generator().manual_seed(1)
    offset, gain = torch.randn(n, 1, 6, 1, generator=own) * 0.3, (torch.randn(n, 1, 6, 1, generator=own) * 0.2).exp()
    noise = torch.Generator().manual_seed(10 + session)
    return torch.randn(n, windows, 6, 32, generator=noise) * gain + offset


def states(model, windows, text="pseudo"):
    net = personalize(model, rule(text))
    for i, rows in enumerate(windows):
        net(rows, user=i)
    return [net.state(i) for i in range(len(windows))]


def step(model, text="pseudo", n=50):
    """States before and after one window, and the window's own channel means in the first layer."""
    x = people(1, n + 1)[0]
    net = personalize(model, rule(text))
    net(x[:n], user="ann")
    before = net.state("ann")
    net(x[n:], user="ann")
    return before, net.state("ann"), model.features[0](x[n:].unsqueeze(2)).mean((0, 2, 3)).detach().double()


def test_two_states_give_away_the_window_between_them(model):
    before, after, window = step(model)
    torch.testing.assert_close(window_between(before, after)[FIRST], window, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="no window lies between"):
        window_between(after, before)


def test_the_minimum_count_keeps_single_windows_apart(model):
    before, after, _ = step(model)
    prior, release = layer_priors(model), Release(minimum=25)
    a, b = release.of(before, prior), release.of(after, prior)
    assert (a.n, b.n) == (50, 50), "told in steps of the minimum"
    with pytest.raises(UserError, match="no window lies between"):
        window_between(a, b)
    with pytest.raises(UserError, match="holds 50 windows and at least 51"):
        Release(minimum=51).of(before, prior)


def test_noise_buries_the_window_and_not_the_user(model):
    before, after, window = step(model, CLIPPED)
    prior, draw = layer_priors(model), torch.Generator().manual_seed(0)
    released = [Release(minimum=1, noise=1.0).of(s, prior, draw) for s in (before, after)]
    sd = prior[FIRST].var.double().sqrt()
    error = ((window_between(*released)[FIRST] - window) / sd).abs().median()
    assert error > 3, "further off than any clipped window can be from the mean"
    shift = (released[1].parts[FIRST][0].mean - after.parts[FIRST][0].mean) / sd
    assert shift.abs().median() < 0.3
    assert all((parts[0].variance() > 0).all() for s in released for parts in s.parts.values())


def test_noise_has_the_stated_size(model):
    prior, state = layer_priors(model), step(model, CLIPPED)[0]
    draw = torch.Generator().manual_seed(0)
    drawn = torch.stack([Release(minimum=1, noise=0.5).of(state, prior, draw).parts[LAST][0].mean for _ in range(300)])
    expected = 0.5 * 2 * 3 * prior[LAST].var.double().sqrt() / state.n
    torch.testing.assert_close(drawn.std(0), expected, rtol=0.25, atol=0)


def test_first_layers_tell_people_apart_and_late_ones_alone_do_less_with_noise(model):
    sessions = [states(model, people(session=s), CLIPPED) for s in (0, 1)]
    assert reidentified(*sessions, FIRST) > 0.7, "chance is 1/24"
    prior, draw = layer_priors(model), torch.Generator().manual_seed(0)
    hidden = [[Release(minimum=60, noise=3.0).of(s, prior, draw) for s in session] for session in sessions]
    assert reidentified(*hidden, FIRST) < 0.35
    only_late = Release(minimum=60, last=1).of(sessions[0][0], prior)
    assert only_late.parts[FIRST][0].n == 0
    assert (only_late.parts[FIRST][0].mean == 0).all()
    assert only_late.parts[LAST][0].n == 60
    assert only_late.n == 60


def test_classes_tallies_and_calibration_never_leave(model):
    net = personalize(model, rule("pseudo"))
    net.calibrate(people(1)[0], user="ann", then="adapt")
    net(people(1)[0], user="ann")
    told = Release(minimum=60).of(net.state("ann"), layer_priors(model))
    assert not told.classes.any()
    assert not told.base
    assert set(told.tally.values()) == {0.0}
    assert told.parts[FIRST][0].mean.equal(net.state("ann").parts[FIRST][0].mean), "without noise, what was measured"


def test_released_states_merge_and_late_layers_alone_leave_the_others_where_they_were(model):
    a, b = states(model, people(2))
    prior = layer_priors(model)
    whole = Release(minimum=60).of(a, prior).merge(Release(minimum=60, last=1).of(b, prior))
    assert whole.parts[FIRST][0].n == 60
    assert whole.parts[LAST][0].n == 120
    net = personalize(model, rule("pseudo"))
    net.load("ann", Release(minimum=60, last=1).of(b, prior))
    torch.testing.assert_close(net.statistics("ann")[FIRST][0], prior[FIRST].mean)


def test_clipping_bounds_what_one_window_can_do(model):
    prior = layer_priors(model)
    for text, bounded in ((CLIPPED, True), ("pseudo", False)):
        net = personalize(model, rule(text))
        net(people(1)[0], user="ann")
        before = net.state("ann").parts
        net(torch.full((1, 6, 32), 1e4), user="ann")
        after = net.state("ann").parts
        moved = [(after[p][0].mean - before[p][0].mean).abs() / prior[p].var.double().sqrt() for p in before]
        assert all((m <= 2 * 3 / 61 + 1e-6).all() for m in moved) is bounded


def test_clipping_changes_nothing_where_windows_are_ordinary_and_works_in_peeking_rules(model):
    x = people(1)[0]
    for text in ("pseudo", "dabn"):
        plain, clipped = (personalize(model, rule(t)) for t in (text, f"{text}:clip=1e6"))
        assert torch.equal(plain(x, user=1), clipped(x, user=1))
    wild = torch.full((1, 6, 32), 1e4)
    outs = [personalize(model, rule(t)).predict(wild, user=1) for t in ("dabn", "dabn:clip=0.5")]
    assert not torch.allclose(*outs)


def test_impossible_releases_say_why(model):
    prior, (state,) = layer_priors(model), states(model, people(1))
    for options, message in (
        ({"minimum": 0}, "minimum=0 is impossible"),
        ({"noise": -1.0}, "noise=-1 is impossible"),
        ({"last": -1}, "last=-1 is impossible"),
    ):
        with pytest.raises(UserError, match=message):
            Release(**options)
    with pytest.raises(UserError, match="lets a window say anything.*pseudo:clip=3"):
        Release(minimum=1, noise=1.0).of(state, prior)
    with pytest.raises(UserError, match="last=4 layers of a network that has 3"):
        Release(minimum=1, last=4).of(state, prior)
    both = replace(state, parts={p: parts * 2 for p, parts in state.parts.items()})
    with pytest.raises(UserError, match="by class or component"):
        Release(minimum=1).of(both, prior)
    assert isinstance(model, nn.Module)
