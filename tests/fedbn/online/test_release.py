"""Attacks on states, and how much each release control prevents."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedbn.errors import UserError
from fedbn.models.har_cnn import HarCNN
from fedbn.online import personalize
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


def recordings(n=24, windows=60, session=0):
    """Windows ``[n, windows, 6, 32]`` of n users, each with a fixed offset and gain."""
    fixed = torch.Generator().manual_seed(1)
    offset = torch.randn(n, 1, 6, 1, generator=fixed) * 0.3
    gain = (torch.randn(n, 1, 6, 1, generator=fixed) * 0.2).exp()
    noise = torch.Generator().manual_seed(10 + session)
    return torch.randn(n, windows, 6, 32, generator=noise) * gain + offset


def states(model, windows, text="pseudo"):
    net = personalize(model, text)
    for i, rows in enumerate(windows):
        net(rows, user=i)
    return [net.state(i) for i in range(len(windows))]


def step(model, text="pseudo", n=50):
    """States before and after one window, and the window's channel means in the first layer."""
    x = recordings(1, n + 1)[0]
    net = personalize(model, text)
    net(x[:n], user="ann")
    before = net.state("ann")
    net(x[n:], user="ann")
    return before, net.state("ann"), model.features[0](x[n:].unsqueeze(2)).mean((0, 2, 3)).detach().double()


def test_window_between_states_is_recovered(model):
    before, after, window = step(model)
    torch.testing.assert_close(window_between(before, after)[FIRST], window, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="there is no window between"):
        window_between(after, before)


def test_minimum_hides_single_windows(model):
    before, after, _ = step(model)
    prior, release = layer_priors(model), Release(minimum=25)
    a, b = release.apply(before, prior), release.apply(after, prior)
    assert (a.n, b.n) == (50, 50), "counts are multiples of the minimum"
    with pytest.raises(UserError, match="there is no window between"):
        window_between(a, b)
    with pytest.raises(UserError, match="has 50 windows, a release needs at least 51"):
        Release(minimum=51).apply(before, prior)


def test_noise_hides_window_but_not_user(model):
    before, after, window = step(model, CLIPPED)
    prior, draw = layer_priors(model), torch.Generator().manual_seed(0)
    released = [Release(minimum=1, noise=1.0).apply(s, prior, draw) for s in (before, after)]
    sd = prior[FIRST].var.double().sqrt()
    error = ((window_between(*released)[FIRST] - window) / sd).abs().median()
    assert error > 3, "larger than the distance of any clipped window from the mean"
    shift = (released[1].parts[FIRST][0].mean - after.parts[FIRST][0].mean) / sd
    assert shift.abs().median() < 0.3
    assert all((parts[0].variance() > 0).all() for s in released for parts in s.parts.values())


def test_noise_has_documented_scale(model):
    prior, state = layer_priors(model), step(model, CLIPPED)[0]
    draw, release = torch.Generator().manual_seed(0), Release(minimum=1, noise=0.5)
    means = torch.stack([release.apply(state, prior, draw).parts[LAST][0].mean for _ in range(300)])
    expected = 0.5 * 2 * 3 * prior[LAST].var.double().sqrt() / state.n
    torch.testing.assert_close(means.std(0), expected, rtol=0.25, atol=0)


def test_noise_reduces_reidentification(model):
    sessions = [states(model, recordings(session=s), CLIPPED) for s in (0, 1)]
    assert reidentified(*sessions, FIRST) > 0.7, "chance is 1/24"
    prior, draw = layer_priors(model), torch.Generator().manual_seed(0)
    hidden = [[Release(minimum=60, noise=3.0).apply(s, prior, draw) for s in session] for session in sessions]
    assert reidentified(*hidden, FIRST) < 0.35
    only_late = Release(minimum=60, last=1).apply(sessions[0][0], prior)
    (first,), (last,) = only_late.parts[FIRST], only_late.parts[LAST]
    assert (first.n, last.n, only_late.n) == (0, 60, 60)
    assert not first.mean.any()


def test_release_removes_classes_tallies_and_calibration(model):
    net = personalize(model, "pseudo")
    net.calibrate(recordings(1)[0], user="ann", then="adapt")
    net(recordings(1)[0], user="ann")
    released = Release(minimum=60).apply(net.state("ann"), layer_priors(model))
    assert (bool(released.classes.any()), released.base, set(released.tally.values())) == (False, {}, {0.0})
    assert released.parts[FIRST][0].mean.equal(net.state("ann").parts[FIRST][0].mean), "means are exact without noise"


def test_released_states_merge_and_load(model):
    a, b = states(model, recordings(2))
    prior = layer_priors(model)
    whole = Release(minimum=60).apply(a, prior).merge(Release(minimum=60, last=1).apply(b, prior))
    assert (whole.parts[FIRST][0].n, whole.parts[LAST][0].n) == (60, 120)
    net = personalize(model, "pseudo")
    net.load("bob", whole)
    assert net.state("bob").n == 120
    net.load("ann", Release(minimum=60, last=1).apply(b, prior))
    torch.testing.assert_close(net.statistics("ann")[FIRST][0], prior[FIRST].mean)


def test_clip_bounds_influence_of_one_window(model):
    prior = layer_priors(model)
    for text, bounded in ((CLIPPED, True), ("pseudo", False)):
        net = personalize(model, text)
        net(recordings(1)[0], user="ann")
        before = net.state("ann").parts
        net(torch.full((1, 6, 32), 1e4), user="ann")
        after = net.state("ann").parts
        shifts = [(after[p][0].mean - before[p][0].mean).abs() / prior[p].var.double().sqrt() for p in before]
        assert all((m <= 2 * 3 / 61 + 1e-6).all() for m in shifts) is bounded


def test_clip_affects_only_extreme_windows(model):
    x = recordings(1)[0]
    for text in ("pseudo", "dabn"):
        plain, clipped = (personalize(model, t) for t in (text, f"{text}:clip=1e6"))
        assert torch.equal(plain(x, user=1), clipped(x, user=1))
    extreme = torch.full((1, 6, 32), 1e4)
    outs = [personalize(model, t).predict(extreme, user=1) for t in ("dabn", "dabn:clip=0.5")]
    assert not torch.allclose(*outs)


def test_release_rejects_bad_input(model):
    prior, (state,) = layer_priors(model), states(model, recordings(1))
    for option, value in (("minimum", 0), ("noise", -1.0), ("last", -1)):
        with pytest.raises(UserError, match=f"{option}={value:g} is out of range"):
            Release(**{option: value})
    two_parts = replace(state, parts={p: parts * 2 for p, parts in state.parts.items()})
    for options, released, message in (
        ({"noise": 1.0}, state, "does not clip windows.*pseudo:clip=3"),
        ({"last": 4}, state, "last=4 layers of a network that has 3"),
        ({}, two_parts, "by class or component"),
    ):
        with pytest.raises(UserError, match=message):
            Release(minimum=1, **options).apply(released, prior)
