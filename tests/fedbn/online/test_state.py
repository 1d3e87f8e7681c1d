from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedbn.errors import UserError
from fedbn.models.har_cnn import HarCNN
from fedbn.online import BNState, DirectoryStore, SQLiteStore, personalize, population_prior, rule, source_prior
from fedbn.online.personalized import personalized_copy
from fedbn.online.rules.base import rules
from fedbn.online.state import fingerprint
from fedbn.statistics.moments import Moments
from fedbn.statistics.recalibration import all_moments

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


def met(text="pseudo", n=8, model=None, user="ann", **kwargs):
    net = personalize(model or network(), rule(text), **kwargs)
    for row in data(n):
        net(row[None], user=user)
    return net


def close(a: BNState, b: BNState, tolerance=1e-5):
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
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_state_survives_bytes_and_goes_on_as_if_nothing_had_happened(name, calibrated):
    model = network()
    net = personalize(model, rule(name), prior=prior_for(name, model))
    other = personalize(model, rule(name), prior=prior_for(name, model))
    if calibrated:
        net.calibrate(data(6, seed=3), user="ann", then="adapt")
    for row in data(5):
        net(row[None], user="ann")
    state = BNState.from_bytes(net.state("ann").to_bytes())
    assert state.to_bytes() == net.state("ann").to_bytes(), "equal states are equal bytes"
    other.load("eve", state)
    for row in data(5, seed=2):
        assert torch.equal(net(row[None], user="ann"), other(row[None], user="eve"))
    assert net.report("ann") == other.report("eve")


def test_a_state_of_the_sensor_network_takes_less_than_two_kilobytes():
    net = personalize(HarCNN((6, 128), 6), rule("pseudo:n0=64:diversity=1"))
    windows = torch.randn(9, 6, 128, generator=torch.Generator().manual_seed(0))
    net(windows, user="ann")
    assert len(net.state("ann").to_bytes()) <= 2048
    net.calibrate(windows, user="ann")
    assert len(net.state("ann").to_bytes()) <= 2048
    net.calibrate(windows, user="ann", then="adapt")  # statistics of its own to start from, and what was met since
    net(windows, user="ann")
    assert len(net.state("ann").to_bytes(torch.float16)) <= 2048


def test_half_precision_halves_the_size_and_keeps_three_digits():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(4, 2000), nn.BatchNorm1d(2000), nn.Linear(2000, 2)).eval()
    net = personalize(wide, rule("pseudo"))
    net(torch.randn(9, 4) * 300, user=1)
    state = net.state(1)
    small = state.to_bytes(torch.float16)
    assert len(small) < 0.6 * len(state.to_bytes())
    assert len(state.to_bytes()) < 2 * 4 * 2000 + 1000
    back = BNState.from_bytes(small)
    torch.testing.assert_close(back.parts["1"][0].mean, state.parts["1"][0].mean, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(back.parts["1"][0].variance(), state.parts["1"][0].variance(), rtol=2e-3, atol=1e-2)
    net(torch.randn(9, 4) * 1e6, user=2)
    with pytest.raises(UserError, match="too large for float16"):
        net.state(2).to_bytes(torch.float16)


def test_states_of_another_model_rule_or_layout_are_refused():
    net = met()
    state = net.state("ann")
    data_ = state.to_bytes()
    assert BNState.from_bytes(data_, model=fingerprint(network()), rule="pseudo").n == 8
    with pytest.raises(UserError, match="belongs to model .* not elsewhere"):
        BNState.from_bytes(data_, model="elsewhere")
    with pytest.raises(UserError, match="belongs to model"):
        personalize(network(seed=1), rule("pseudo")).load("ann", state)
    with pytest.raises(UserError, match="kept by rule 'pseudo', not 'pseudo:n0=3.0'"):
        personalize(network(), rule("pseudo:n0=3")).load("ann", state)
    with pytest.raises(UserError, match="kept by rule"):
        state.merge(replace(state, rule="ema"))
    with pytest.raises(UserError, match="layout 1, this program reads 2"):
        BNState.from_bytes(data_.replace(b'\\"version\\":2', b'\\"version\\":1'))
    for damaged in (b"", b"xx", data_[:-1], data_[:40], b"\xff" * 100):
        with pytest.raises(UserError, match="no state of a user, or damaged"):
            BNState.from_bytes(damaged)


def test_the_fingerprint_sees_every_weight_and_statistic():
    net = network()
    before = fingerprint(net)
    net.features[1].running_var[3] += 1e-3
    assert fingerprint(net) != before
    assert fingerprint(network()) == before


# ---------------------------------------------------------------- algebra


def state_of(x):
    """The state of a user of a one-layer network, where nothing lies before the layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(6, K)).double().eval()
    net = personalize(model, rule("pseudo:n0=2"))
    for row in x:
        net(row[None], user=1)
    return net.state(1), net, model


@given(parts=st.lists(st.integers(1, 5), min_size=2, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_states_merge_like_the_windows_behind_them_and_come_apart_again(parts, seed):
    x = torch.randn(sum(parts), 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3
    whole, _, model = state_of(x)
    exact = all_moments(model, x)["0"]
    mean, var = exact.mean, exact.variance()
    # windows of a new user are normalized by the source until something is committed; moments of layer 0 do not care
    split = [state_of(part)[0] for part in x.split(parts)]
    merged = split[0]
    for part in split[1:]:
        merged = merged.merge(part)
    for state in (whole, merged):
        assert state.n == len(x)
        torch.testing.assert_close(state.layers["0"].mean, mean)
        torch.testing.assert_close(state.layers["0"].variance(), var)
    assert merged.tally["learnt"] == len(x)
    for part in split[1:]:
        merged = merged.unmerge(part)
    close(merged, split[0], 1e-7)
    with pytest.raises(UserError, match="never merged into the state"):
        split[0].unmerge(whole)


def test_a_merged_state_is_in_use_at_once():
    x = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    whole, net, _ = state_of(x)
    first, _, _ = state_of(x[:4])
    second, _, _ = state_of(x[4:])
    net.load("merged", first)
    net.merge("merged", second)
    assert net.users == ["1", "merged"]
    torch.testing.assert_close(net.predict(x, user="merged"), net.predict(x, user=1))
    net.merge("nobody", whole)
    torch.testing.assert_close(net.predict(x, user="nobody"), net.predict(x, user=1))


def test_decay_gives_weight_back_to_the_prior_and_to_new_windows():
    x = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    state, net, _ = state_of(x)
    net.load("old", state.decay(0.25))
    r = 2 / (2 + 2)
    torch.testing.assert_close(net.statistics("old")["0"][0], (1 - r) * state.layers["0"].mean)
    assert net.state("old").n == 2
    torch.testing.assert_close(net.state("old").classes, state.classes / 4)
    net.load("gone", state.decay(0))
    assert torch.equal(net.predict(x, user="gone"), net.predict(x, user="new"))


def test_numbers_that_are_no_moments_merge_by_windows():
    a, b = met("tema", 3), met("tema", 5)
    b(data(4, seed=9), user="ann")
    one, two = a.state("ann"), b.state("ann")
    for path, e in one.merge(two).extra.items():
        torch.testing.assert_close(e, (3 * one.extra[path] + 9 * two.extra[path]) / 12)
    assert not torch.equal(one.extra["features.1"], two.extra["features.1"])


def test_shrinking_mixes_in_so_many_windows_of_a_population():
    x = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, _, _ = state_of(x[:3])
    b, _, _ = state_of(x[3:] * 4 + 7)
    shrunk = a.shrink(b, 5.0).layers["0"]
    both = a.layers["0"].merge(b.layers["0"])
    torch.testing.assert_close((shrunk.n, shrunk.mean, shrunk.m2), (both.n, both.mean, both.m2))


def test_the_distance_is_that_of_gaussians():
    a, _, _ = state_of(torch.randn(5, 2, 3, dtype=torch.float64))
    moved = {p: tuple(Moments(m.n, m.mean + 3, m.m2) for m in ms) for p, ms in a.parts.items()}
    assert a.distance(a) == 0
    assert a.distance(replace(a, parts=moved)) == pytest.approx(3 * 2**0.5)
    with pytest.raises(UserError, match="met no windows"):
        a.distance(a.decay(0))


# ---------------------------------------------------------------- plain networks


def test_a_state_applied_to_the_model_is_the_export_and_nothing_else_changes():
    model = network()
    net = met(model=model)
    x = data(4, seed=5)
    plain = personalized_copy(model, net.state("ann"))
    with torch.no_grad():
        assert torch.equal(plain(x), net.export("ann")(x))
        torch.testing.assert_close(plain(x), net.predict(x, user="ann"), rtol=1e-5, atol=1e-6)
    assert fingerprint(model) == fingerprint(network())
    assert not any("UserNorm" in type(m).__name__ for m in plain.modules())


def test_an_exported_network_folds_and_goes_through_torch_export():
    net = met("ema:rate=0.3")
    x = data(4, seed=5)
    plain = net.export("ann")
    program = torch.export.export(plain, (x,))
    torch.testing.assert_close(program.module()(x), net.predict(x, user="ann"), rtol=1e-5, atol=1e-6)
    conv, bn = plain.features[0], plain.features[1]
    folded = nn.utils.fuse_conv_bn_eval(conv, bn)
    h = x.unsqueeze(2)
    with torch.no_grad():
        torch.testing.assert_close(folded(h), bn(conv(h)), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- stores


@pytest.fixture(params=["dict", "directory", "sqlite"])
def store(request, tmp_path):
    makers = {
        "dict": dict,
        "directory": lambda: DirectoryStore(tmp_path / "users"),
        "sqlite": lambda: SQLiteStore(tmp_path / "users.db"),
    }
    return makers[request.param]()


NAMES = ["ann", "../ann", "a/b\\c", "ünï ©", "..", "x.bnstate", "50%", "", "A'; DROP TABLE states; --"]


def test_a_store_is_a_mapping_with_any_name(store):
    for i, name in enumerate(NAMES):
        store[name] = bytes([i]) * (i + 1)
    assert sorted(store) == sorted(NAMES)
    assert len(store) == len(NAMES)
    for i, name in enumerate(NAMES):
        assert store[name] == bytes([i]) * (i + 1)
    store["ann"] = b"new"
    assert store["ann"] == b"new"
    assert store.pop("ann") == b"new"
    assert "ann" not in store
    for act in (lambda: store["ann"], lambda: store.__delitem__("ann")):
        with pytest.raises(KeyError):
            act()


def test_users_outlive_the_program(store):
    model = network()
    net = personalize(model, rule("pseudo"), capacity=2, store=store)
    for i, row in enumerate(data(9)):
        net(row[None], user=i % 3)
    net.flush()
    again = personalize(model, rule("pseudo"), capacity=2, store=store)
    assert again.users == ["0", "1", "2"]
    x = data(2, seed=7)
    for user in range(3):
        assert torch.equal(again.predict(x, user=user), net.predict(x, user=user))
    again.forget(1)
    assert list(store) == ["0", "2"]
    with pytest.raises(UserError, match="belongs to model"):
        personalize(network(seed=1), rule("pseudo"), store=store).predict(x, user=0)


def test_a_crash_while_writing_leaves_the_old_state_and_no_half_user(tmp_path, monkeypatch):
    store = DirectoryStore(tmp_path)
    store["ann"] = b"old"

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store["ann"] = b"new"
    (tmp_path / "tmpx1").write_bytes(b"left by a crash")
    assert store["ann"] == b"old"
    assert list(store) == ["ann"]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    store = DirectoryStore(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        store["ann"] = b"x"
    assert not list(tmp_path.iterdir())


def test_a_damaged_store_says_what_it_is(tmp_path):
    place = tmp_path / "users.db"
    place.write_bytes(b"this is no database, but long enough to be looked at" * 20)
    with pytest.raises(UserError, match=r"store .*users.db is damaged or no SQLite database"):
        SQLiteStore(place)
