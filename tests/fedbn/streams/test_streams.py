from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbn.data.population import Examples, User
from fedbn.errors import UserError
from fedbn.plugins import render
from fedbn.streams import FOREIGN, Event, Stream, stream, streams

ALL = sorted(streams())
OWN_WINDOWS_ONLY = ("dirichlet", "iid", "natural", "ptta", "sorted")


def person(n, shift=0.0, classes=4):
    """Windows whose first value is their index in the recording; labels in bouts of five."""
    x = torch.arange(float(n))[:, None, None].repeat(1, 3, 4) + shift
    y = (torch.arange(n) // 5) % classes
    return Examples(x, y, torch.zeros(n, dtype=torch.int64))


def windows(n, *shape, classes=1):
    return Examples(torch.rand(n, *shape), torch.arange(n) % classes, torch.zeros(n))


def make_recordings(k=3, n=60):
    return [person(n, shift=1000.0 * i) for i in range(k)]


@pytest.mark.parametrize("name", ALL)
def test_stream_is_deterministic_and_digest_identifies_it(name):
    spec, recordings = stream(name), make_recordings()
    first, second, *others = (spec.make_all(["a", "b", "c"], recordings, seed=s)[0] for s in (0, 0, 1, 2, 3, 4, 5))
    assert first.digest == second.digest
    assert torch.equal(first.x, second.x)
    is_random = name not in ("natural", "switch", "recurring", "gap")
    assert is_random == (len({o.digest for o in others} | {first.digest}) > 1)
    assert spec.make_all(["z", "b", "c"], recordings, seed=0)[0].digest != first.digest
    assert stream(render(spec)) == spec


@pytest.mark.parametrize("name", ALL)
def test_stream_keeps_windows_with_their_labels(name):
    recordings = make_recordings()
    before = [p.x.clone() for p in recordings]
    result = stream(name).make_all(["a", "b", "c"], recordings, seed=0)
    assert all(torch.equal(p.x, x) for p, x in zip(recordings, before))
    assert [s.user for s in result] == ["a", "b", "c"]
    for i, s in enumerate(result):
        for x, y, person_index in zip(s.x, s.y, s.person_index):
            if name in ("fault", "turned") or y == FOREIGN:
                continue
            owner = recordings[(i + int(person_index)) % 3]
            row = int(x[0, 0]) % 1000
            assert torch.equal(x, owner.x[row])
            assert y == owner.y[row]


@given(n=st.integers(8, 80), classes=st.integers(1, 6), seed=st.integers(0, 50), name=st.sampled_from(OWN_WINDOWS_ONLY))
def test_order_is_a_permutation(n, classes, seed, name):
    own = person(n, classes=classes)
    result = stream(name).make("a", [own], seed)
    assert sorted(result.x[:, 0, 0].tolist()) == list(range(n))
    assert not result.person_index.any()


def num_changes(y):
    return int((y.diff() != 0).sum())


def test_label_correlation_follows_options():
    own = windows(400, 2, 4, classes=4)

    def labels(text):
        return stream(text).make("a", [own], 0).y

    assert num_changes(labels("natural")) == 399
    assert num_changes(labels("sorted")) == 3
    # In each of 4 chunks every class is contiguous.
    assert num_changes(labels("dirichlet:delta=0.01")) <= 15
    assert num_changes(labels("ptta")) <= 15
    assert 200 < num_changes(labels("iid")) < 399
    assert 400 / 25 / 3 < num_changes(labels("bouts:length=25")) < 3 * 400 / 25
    assert num_changes(labels("bouts:length=100")) < num_changes(labels("bouts:length=5"))


def test_dirichlet_concentration_sets_classes_per_chunk():
    own = windows(400, 2, classes=4)

    def mean_classes(delta):
        chunks = [stream(f"dirichlet:delta={delta}").make("a", [own], s).y.chunk(4) for s in range(5)]
        return sum(len(c.unique()) for run in chunks for c in run) / 20

    assert mean_classes(1000) == 4
    assert mean_classes(0.01) < 3


def test_dirichlet_full_chunks_get_no_more_windows():
    # With each class in a single chunk, ten equal classes fill ten chunks.
    y = np.arange(400) % 10
    for seed in range(10):
        chunks = stream("dirichlet:delta=0.001").chunks(y, np.random.default_rng(seed))
        sizes = [sum(map(len, chunk)) for chunk in chunks]
        assert sum(sizes) == 400
        assert max(sizes) < 80
        assert min(sizes) >= 10


def test_bouts_change_class():
    y = stream("bouts:length=1").make("a", [windows(400, 2, classes=2)], 0).y
    assert (y.diff() != 0).all()


def test_bouts_follow_prior():
    own = windows(3000, 1, classes=3)
    y = stream("bouts:length=2:prior=8+1+1").make("a", [own], 0).y
    share = torch.bincount(y) / len(y)
    # After a rare class the common one follows with probability 8/9: .47, .26, .26 in the long run.
    assert share[0] > 0.42 > 0.32 > share[1]
    with pytest.raises(UserError, match="prior has 2 numbers but class 2 occurs; give one per class"):
        stream("bouts:prior=1+1").make("a", [own], 0)


def test_switch_and_recurring_change_person_at_events():
    a, b = make_recordings(2)
    s = stream("switch:at=0.25").make_all(["a", "b"], [a, b], 0)[0]
    assert s.events == (Event(15, "switch"),)
    assert s.person_index.tolist() == [0] * 15 + [1] * 45
    assert s.x[:, 0, 0].tolist() == [*range(15), *range(1015, 1060)]
    r = stream("recurring:visits=2").make_all(["a", "b"], [a, b], 0)[0]
    assert [e.at for e in r.events] == [30, 60, 90]
    assert r.x[:, 0, 0].tolist() == [*range(30), *range(1000, 1030), *range(30, 60), *range(1030, 1060)]


def test_mixed_keeps_order_of_each_person():
    s = stream("mixed:people=3").make_all(["a", "b", "c"], make_recordings(), 0)[0]
    for i in range(3):
        assert s.x[s.person_index == i, 0, 0].diff().eq(1).all()
    assert num_changes(s.person_index) > 60


def test_gap_removes_the_middle():
    s = stream("gap:missing=0.5").make("a", [person(60)], 0)
    assert s.x[:, 0, 0].tolist() == [*range(15), *range(45, 60)]
    assert s.events == (Event(15, "gap"),)


def test_fault_starts_and_ends():
    own = windows(60, 4, 5)
    s = stream("fault:lasting=0.2").make("a", [own], 0)
    assert s.events == (Event(20, "fault"), Event(32, "repair"))
    changed = (s.x != own.x).any(2)
    assert changed.sum(1).tolist() == [0] * 20 + [2] * 12 + [0] * 28
    stuck = changed[20].nonzero()[:, 0]
    assert torch.equal(s.x[25, stuck], own.x[19, stuck, -1:].expand(-1, 5))
    flat = stream("fault").make("a", [Examples(own.x[:, :, 0], own.y, own.recording)], 0)
    assert (flat.x != own.x[:, :, 0]).any(1).sum() == 12


def test_foreign_windows_are_inserted_and_labeled():
    own = person(60)
    s = stream("foreign:portion=0.25").make("a", [own], 0)
    assert len(s) == 80
    assert torch.equal(s.x[s.y != FOREIGN], own.x)
    assert torch.equal(s.y[s.y != FOREIGN], own.y)
    random = windows(30, 3, 8)
    s = stream("foreign").make("a", [random], 0)
    pool = [sorted(row.tolist()) for row in random.x.flatten(1)]
    for row in s.x[s.y == FOREIGN].flatten(1):
        assert sorted(row.tolist()) in pool
        assert not (random.x.flatten(1) == row).all(1).any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("natrual", "unknown stream 'natrual'. Did you mean 'natural'?"),
        ("dirichlet:delta=0", "stream 'dirichlet': delta must be above 0, not 0"),
        ("ptta:gamma=-1", "gamma must be above 0, not -1"),
        ("bouts:length=0.5", "length must be at least 1 window, not 0.5"),
        ("bouts:prior=1+0", "stream 'bouts': prior 2 must be above 0, not 0"),
        ("switch:at=1", "stream 'switch': at must be a share between 0 and 1, not 1"),
        ("gap:missing=0", "missing must be a share between 0 and 1, not 0"),
        ("fault:lasting=2", "lasting must be a share between 0 and 1, not 2"),
        ("foreign:portion=1", "portion must be a share between 0 and 1, not 1"),
        ("recurring:visits=1", "visits must be at least 2, not 1"),
        ("mixed:people=1", "people must be at least 2, not 1"),
    ],
)
def test_stream_rejects_bad_input(text, message):
    with pytest.raises(UserError) as error:
        stream(text)
    assert message in str(error.value)


@pytest.mark.parametrize("name", [n for n in ALL if stream(n).num_persons == 1])
def test_stream_of_one_person_is_that_of_the_first_recording(name):
    first, others = person(60), [person(50, shift=1000, classes=3), person(70, shift=2000, classes=5)]
    assert stream(name).make("a", [first, *others], 0).digest == stream(name).make("a", [first], 0).digest


def test_make_all_takes_people_in_cyclic_order():
    recordings = make_recordings(3, n=4)
    made = stream("recurring:people=3:visits=2").make_all(["a", "b", "c"], recordings, 0)
    thousands = [(s.x[:, 0, 0] // 1000).int().tolist() for s in made]
    for own, (first, second, third) in enumerate([(0, 1, 2), (1, 2, 0), (2, 0, 1)]):
        assert thousands[own] == [first] * 2 + [second] * 2 + [third] * 2 + [first] * 2 + [second] * 2 + [third] * 2
    two = stream("switch").make_all(["a", "b", "c"], recordings, 0)
    assert [(s.x[[0, -1], 0, 0] // 1000).int().tolist() for s in two] == [[0, 1], [1, 2], [2, 0]]


def test_make_all_rejects_too_few_people():
    with pytest.raises(UserError, match="stream 'recurring' needs 3 people and there are 2"):
        stream("recurring:people=3").make_all(["a", "b"], make_recordings(2), 0)


def test_stream_requires_equal_lengths():
    with pytest.raises(ValueError, match="2 windows, 1 labels, 2 persons"):
        Stream("a", torch.zeros(2, 1), torch.zeros(1), torch.zeros(2))


def test_digest_covers_every_field():
    base = stream("switch").make_all(["a", "b"], make_recordings(2), 0)[0]
    variants = [base, replace(base, events=()), replace(base, user="b")]
    for field in ("x", "y", "person_index"):
        variants.append(replace(base, **{field: getattr(base, field).clone()}))
        getattr(variants[-1], field).view(-1)[3] += 1
    assert len({s.digest for s in variants}) == 6


def test_turned_rotates_windows_after_the_event():
    own = Examples(torch.randn(20, 6, 8), torch.arange(20) % 4, torch.zeros(20))
    found = stream("turned:at=0.25:degrees=60").make("ann", [own], seed=0)
    assert found.events == (Event(5, "switch"),)
    assert torch.equal(found.x[:5], own.x[:5])
    before, after = (x[5:].unflatten(1, (2, 3)).movedim(2, 0).flatten(1) for x in (own.x, found.x))
    rotation = torch.linalg.lstsq(before.T, after.T).solution.T
    torch.testing.assert_close(rotation @ before, after, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), rtol=1e-4, atol=1e-5)
    assert float(rotation.trace()) == pytest.approx(1 + 2 * np.cos(np.pi / 3), abs=1e-4)
    with pytest.raises(UserError, match="stream 'turned' works on 3-axis sensors"):
        stream("turned").make("ann", [windows(4, 2, 3)], seed=0)


@pytest.mark.parametrize("name", ALL)
def test_stream_uses_windows_without_class_unless_it_orders_by_class(name):
    own, everything = person(20), person(50)
    user, plain = User("ann", "", own, own, stream=everything), User("ann", "", own, own)
    assert stream(name).recording_of(user) is (own if streams()[name].needs_classes else everything)
    assert stream(name).recording_of(plain) is own
