from __future__ import annotations

from dataclasses import replace
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedbn.errors import UserError
from fedbn.models.har_cnn import HarCNN
from fedbn.online import BNState, personalize, population_prior, source_prior
from fedbn.online.personalized import personalized_copy
from fedbn.online.rules.base import rules
from fedbn.online.state import fingerprint
from fedbn.statistics.moments import Moments
from fedbn.statistics.recalibration import all_moments
from tests.helpers import mostly_slow

K = 4


def network(seed=0):
    torch.manual_seed(seed)
    net = HarCNN((3, 16), K)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.3, 3)
    return net.eval()


def data(n, seed=1, shift=1.0):
    return torch.randn(n, 3, 16, generator=torch.Generator().manual_seed(seed)) * 2 + shift


def feed(net, x, user="ann"):
    for row in x:
        net(row[None], user=user)
    return net


def fitted(text="pseudo", n=8):
    return feed(personalize(network(), text), data(n))


def assert_states_close(a: BNState, b: BNState, tolerance=1e-5):
    assert a.parts.keys() == b.parts.keys()
    for path in a.parts:
        for m, k in zip(a.parts[path], b.parts[path], strict=True):
            torch.testing.assert_close((m.n, m.mean, m.m2), (k.n, k.mean, k.m2), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.classes, b.classes, rtol=tolerance, atol=tolerance)
    assert a.tally == pytest.approx(b.tally)


# ---------------------------------------------------------------- bytes


def prior_for(name, model):
    if name == "population":
        return population_prior(model, [data(9, seed=4), data(9, seed=5, shift=0.0)])
    if not name.startswith("class"):
        return None
    return source_prior(model, data(40), torch.arange(40) % K, K)


@pytest.mark.parametrize("name", [n for n in rules() if n != "ttn"])
@pytest.mark.parametrize("calibrated", mostly_slow([False, True], False))
def test_state_round_trip_continues_identically(name, calibrated):
    model = network()
    net, other = (personalize(model, name, prior=prior_for(name, model)) for _ in range(2))
    if calibrated:
        net.calibrate(data(6, seed=3), user="ann", then="adapt")
    feed(net, data(5))
    state = BNState.from_bytes(net.state("ann").to_bytes())
    assert state.to_bytes() == net.state("ann").to_bytes(), "equal states must have equal bytes"
    other.load("eve", state)
    for row in data(5, seed=2):
        assert torch.equal(net(row[None], user="ann"), other(row[None], user="eve"))
    assert net.report("ann") == other.report("eve")


def test_state_of_har_cnn_is_below_two_kilobytes():
    net = personalize(HarCNN((6, 128), 6), "pseudo:n0=64:diversity=1")
    windows = torch.randn(9, 6, 128, generator=torch.Generator().manual_seed(0))
    net(windows, user="ann")
    assert len(net.state("ann").to_bytes()) <= 2048
    net.calibrate(windows, user="ann")
    assert len(net.state("ann").to_bytes()) <= 2048
    net.calibrate(windows, user="ann", then="adapt")  # calibrated statistics and the windows since
    net(windows, user="ann")
    assert len(net.state("ann").to_bytes(torch.float16)) <= 2048


def test_float16_state_has_half_size_and_three_digits():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(4, 2000), nn.BatchNorm1d(2000), nn.Linear(2000, 2)).eval()
    net = personalize(wide, "pseudo")
    net(torch.randn(9, 4) * 300, user=1)
    state = net.state(1)
    small = state.to_bytes(torch.float16)
    assert len(small) < 0.6 * len(state.to_bytes())
    assert len(state.to_bytes()) < 2 * 4 * 2000 + 1000
    loaded = BNState.from_bytes(small)
    torch.testing.assert_close(loaded.parts["1"][0].mean, state.parts["1"][0].mean, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(loaded.parts["1"][0].variance(), state.parts["1"][0].variance(), rtol=2e-3, atol=1e-2)
    net(torch.randn(9, 4) * 1e6, user=2)
    with pytest.raises(UserError, match="too large for float16"):
        net.state(2).to_bytes(torch.float16)


def test_state_rejects_other_model_rule_or_format():
    state = fitted().state("ann")
    data_ = state.to_bytes()
    assert BNState.from_bytes(data_, model=fingerprint(network()), rule="pseudo").n == 8
    with pytest.raises(UserError, match="belongs to model .* not elsewhere"):
        BNState.from_bytes(data_, model="elsewhere")
    with pytest.raises(UserError, match="belongs to model"):
        personalize(network(seed=1), "pseudo").load("ann", state)
    with pytest.raises(UserError, match="belongs to rule 'pseudo', not 'pseudo:n0=3.0'"):
        personalize(network(), "pseudo:n0=3").load("ann", state)
    with pytest.raises(UserError, match="belongs to rule"):
        state.merge(replace(state, rule="ema"))
    with pytest.raises(UserError, match="format 1, this program reads 4"):
        BNState.from_bytes(data_.replace(b'\\"version\\":4', b'\\"version\\":1'))
    for damaged in (b"", b"xx", data_[:-1], data_[:40], b"\xff" * 100):
        with pytest.raises(UserError, match="not a user's state, or are damaged"):
            BNState.from_bytes(damaged)


def test_fingerprint_depends_on_weights_and_statistics():
    net = network()
    before = fingerprint(net)
    net.features[1].running_var[3] += 1e-3
    assert fingerprint(net) != before
    assert fingerprint(network()) == before


# ---------------------------------------------------------------- algebra


def state_of(x):
    """State of a user of a network whose first layer is its only BN layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(6, K)).double().eval()
    net = feed(personalize(model, "pseudo:n0=2"), x, user=1)
    return net.state(1), net, model


def draw(n, seed=0, mean=3):
    return torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


@given(parts=st.lists(st.integers(1, 5), min_size=2, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_merge_and_unmerge_states(parts, seed):
    x = draw(sum(parts), seed)
    whole, _, model = state_of(x)
    exact = all_moments(model, x)["0"]
    # the moments of layer 0 do not depend on the statistics that normalize it
    split = [state_of(part)[0] for part in x.split(parts)]
    merged = reduce(BNState.merge, split)
    for state in (whole, merged):
        assert state.n == len(x)
        torch.testing.assert_close(state.layers["0"].mean, exact.mean)
        torch.testing.assert_close(state.layers["0"].variance(), exact.variance())
    assert merged.tally["learned"] == len(x)
    assert_states_close(reduce(BNState.unmerge, split[1:], merged), split[0], 1e-7)
    with pytest.raises(UserError, match="never merged into the state"):
        split[0].unmerge(whole)


def test_merged_state_takes_effect_immediately():
    x = draw(9)
    whole, net, _ = state_of(x)
    net.load("merged", state_of(x[:4])[0])
    net.merge("merged", state_of(x[4:])[0])
    assert net.users == ["1", "merged"]
    torch.testing.assert_close(net.predict(x, user="merged"), net.predict(x, user=1))
    net.merge("new", whole)
    torch.testing.assert_close(net.predict(x, user="new"), net.predict(x, user=1))


def test_decay_raises_weight_of_prior_and_new_windows():
    x = draw(8)
    state, net, _ = state_of(x)
    net.load("old", state.decay(0.25))
    torch.testing.assert_close(net.statistics("old")["0"][0], (1 - 2 / (2 + 2)) * state.layers["0"].mean)
    assert net.state("old").n == 2
    torch.testing.assert_close(net.state("old").classes, state.classes / 4)
    net.load("gone", state.decay(0))
    assert torch.equal(net.predict(x, user="gone"), net.predict(x, user="new"))


def test_merge_averages_extra_values_by_windows():
    a, b = fitted("tema", 3), fitted("tema", 5)
    b(data(4, seed=9), user="ann")
    one, two = a.state("ann"), b.state("ann")
    for path, e in one.merge(two).extra.items():
        torch.testing.assert_close(e, (3 * one.extra[path] + 9 * two.extra[path]) / 12)
    assert not torch.equal(one.extra["features.1"], two.extra["features.1"])


def test_unmerge_inverts_merge_for_extra_values_and_counts():
    a, b = fitted("tema", 3), fitted("tema", 5)
    b(data(4, seed=9), user="ann")
    one, two = a.state("ann"), b.state("ann")
    merged = one.merge(two)
    assert merged.n == 12
    assert merged.tally == one.tally | {"t": 3 + 6, "offered": 12, "learned": 12}
    for whole, part, rest in ((merged, one, two), (merged, two, one)):
        left = whole.unmerge(part)
        assert_states_close(left, rest)
        for path, e in left.extra.items():
            torch.testing.assert_close(e, rest.extra[path])
    assert not torch.allclose(merged.extra["features.1"], one.extra["features.1"])
    empty = merged.unmerge(merged)
    assert empty.n == 0
    assert all(torch.equal(e, merged.extra[path]) for path, e in empty.extra.items())


def test_shrink_merges_n0_windows_of_prior():
    x = draw(8, mean=0)
    a, b = (state_of(part)[0] for part in (x[:3], x[3:] * 4 + 7))
    shrunk = a.shrink(b, 5.0).layers["0"]
    both = a.layers["0"].merge(b.layers["0"])
    torch.testing.assert_close((shrunk.n, shrunk.mean, shrunk.m2), (both.n, both.mean, both.m2))


def test_distance_is_wasserstein_of_gaussians():
    a, _, _ = state_of(torch.randn(5, 2, 3, dtype=torch.float64))
    shifted = {p: tuple(Moments(m.n, m.mean + 3, m.m2) for m in ms) for p, ms in a.parts.items()}
    assert a.distance(a) == 0
    assert a.distance(replace(a, parts=shifted)) == pytest.approx(3 * 2**0.5)
    with pytest.raises(UserError, match="state without windows is not defined"):
        a.distance(a.decay(0))


# ---------------------------------------------------------------- plain networks


def test_personalized_copy_matches_export():
    model = network()
    net = feed(personalize(model, "pseudo"), data(8))
    x = data(4, seed=5)
    plain = personalized_copy(model, net.state("ann"))
    with torch.no_grad():
        assert torch.equal(plain(x), net.export("ann")(x))
        torch.testing.assert_close(plain(x), net.predict(x, user="ann"), rtol=1e-5, atol=1e-6)
    assert fingerprint(model) == fingerprint(network())
    assert not any("UserNorm" in type(m).__name__ for m in plain.modules())


def test_export_supports_folding_and_torch_export():
    net = fitted("ema:rate=0.3")
    x = data(4, seed=5)
    plain = net.export("ann")
    program = torch.export.export(plain, (x,))
    torch.testing.assert_close(program.module()(x), net.predict(x, user="ann"), rtol=1e-5, atol=1e-6)
    conv, bn = plain.features[0], plain.features[1]
    folded = nn.utils.fuse_conv_bn_eval(conv, bn)
    h = x.unsqueeze(2)
    with torch.no_grad():
        torch.testing.assert_close(folded(h), bn(conv(h)), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- validation


def edited(state, **values):
    return replace(state, **{name: edit(getattr(state, name)) for name, edit in values.items()})


def first_part(change):
    """Edit of the moments of the first layer."""

    def edit(parts):
        path = next(iter(parts))
        return {**parts, path: tuple(change(m) for m in parts[path])}

    return edit


def with_value(name, value):
    def change(moments):
        tensor = getattr(moments, name).clone()
        tensor.view(-1)[0] = value
        return replace(moments, **{name: tensor})

    return first_part(change)


BAD_STATES = {
    "another row": ({"tally": lambda t: {**t, "mean": 5.0}}, "lacks entries, or has unknown ones"),
    "no counter": ({"tally": lambda t: {k: v for k, v in t.items() if k != "t"}}, "lacks entries"),
    "NaN counter": ({"tally": lambda t: {**t, "offered": float("nan")}}, "counts must be finite"),
    "negative counter": ({"tally": lambda t: {**t, "learned": -1.0}}, "counts must be finite"),
    "huge counter": ({"tally": lambda t: {**t, "t": 1e30}}, "counts must be finite"),
    "layer missing": ({"parts": lambda p: dict(list(p.items())[1:])}, "it has the layers"),
    "layer too many": ({"parts": lambda p: {**p, "x": next(iter(p.values()))}}, "it has the layers"),
    "no base of a layer": ({"base": lambda b: {"x": Moments.empty(3)}}, "it has the layers"),
    "extra missing": ({"extra": lambda e: {}}, "lacks entries"),
    "width": ({"parts": first_part(lambda m: Moments.empty(3))}, "has another shape"),
    "parts": ({"parts": lambda p: {k: v * 2 for k, v in p.items()}}, "has another shape"),
    "extra rows": ({"extra": lambda e: {k: torch.zeros(2, v.shape[1]) for k, v in e.items()}}, "has another shape"),
    "classes": ({"classes": lambda c: torch.zeros(9)}, "it has 9 classes, not 4"),
    "NaN class": ({"classes": lambda c: c * torch.nan}, "counts must be finite"),
    "negative count": (
        {"parts": lambda p: {k: tuple(replace(m, n=-m.n) for m in v) for k, v in p.items()}},
        "counts must be finite",
    ),
    "NaN mean": ({"parts": with_value("mean", torch.nan)}, "not finite, negative, or too large"),
    "huge mean": ({"parts": with_value("mean", 1e20)}, "not finite, negative, or too large"),
    "negative variance": ({"parts": with_value("m2", -1.0)}, "not finite, negative, or too large"),
    "infinite variance": ({"parts": with_value("m2", torch.inf)}, "not finite, negative, or too large"),
    "another model": ({"model": lambda m: "x"}, "belongs to model x"),
    "another rule": ({"rule": lambda r: "ema"}, "belongs to rule 'ema'"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_state_that_is_not_valid_changes_nothing(name):
    edits, message = BAD_STATES[name]
    net = fitted()
    net(data(2), user=["bob", "cem"])
    bad = edited(net.state("ann"), **edits)
    before = [net.state(user).to_bytes() for user in ("ann", "bob", "cem")]
    for call in (net.load, net.merge):
        for user in ("ann", "new"):
            with pytest.raises(UserError, match=message):
                call(user, bad)
    assert [net.state(user).to_bytes() for user in ("ann", "bob", "cem")] == before
    assert net.users == ["ann", "bob", "cem"]


def test_merge_that_exceeds_the_limits_changes_nothing():
    net = fitted()
    state = net.state("ann")
    many = replace(state, tally={**state.tally, "t": 9e11, "offered": 9e11, "learned": 9e11})
    net.load("ann", many)
    many = net.state("ann")
    with pytest.raises(UserError, match="counts must be finite, not negative, and at most 1e"):
        net.merge("ann", many)
    assert net.state("ann").tally == many.tally


@pytest.mark.slow
@given(st.data())
@settings(max_examples=30, deadline=None)
def test_damaged_bytes_of_a_state_are_rejected(drawn):
    net = fitted()
    good = net.state("ann").to_bytes()
    damaged = bytearray(good)
    for _ in range(drawn.draw(st.integers(1, 3))):
        at = drawn.draw(st.integers(0, len(damaged) - 1))
        edit = drawn.draw(st.sampled_from(["flip", "cut", "insert", "digit"]))
        if edit == "flip":
            damaged[at] ^= 1 << drawn.draw(st.integers(0, 7))
        elif edit == "cut":
            del damaged[at : at + drawn.draw(st.integers(1, 20))]
        elif edit == "insert":
            damaged[at:at] = drawn.draw(st.binary(min_size=1, max_size=9))
        else:
            damaged[at : at + 1] = drawn.draw(st.sampled_from([b"9", b"-", b"0", b'"', b"e"]))
        if not damaged:
            break
    try:
        state = BNState.from_bytes(bytes(damaged))
        net.load("bob", state)
    except UserError:
        assert net.users == ["ann"]
    else:  # only spaces of the header have changed
        assert net.state("bob").to_bytes() == good


@pytest.mark.parametrize(("old", "new"), [('frozen\\":false', 'frozen\\":1    '), ('layers\\":{', 'layers\\":7')])
def test_metadata_of_another_type_is_rejected(old, new):
    data_ = fitted().state("ann").to_bytes()
    assert old.encode() in data_
    with pytest.raises(UserError, match="not a user's state, or are damaged"):
        BNState.from_bytes(data_.replace(old.encode(), new.encode()))
