from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbn.data.population import Examples
from fedbn.errors import UserError
from fedbn.plugins import render
from fedbn.streams import FOREIGN, Event, Stream, stream, streams

ALL = sorted(streams())
OWN_WINDOWS_ONLY = ("dirichlet", "iid", "natural", "ptta", "sorted")


def person(n, shift=0.0, classes=4):
    """Windows whose first value is their place in the recording; labels in recorded bouts of five."""
    x = torch.arange(float(n))[:, None, None].repeat(1, 3, 4) + shift
    y = (torch.arange(n) // 5) % classes
    return Examples(x, y, torch.zeros(n, dtype=torch.int64))


def people(k=3, n=60):
    return [person(n, shift=1000.0 * i) for i in range(k)]


@pytest.mark.parametrize("name", ALL)
def test_a_stream_is_determined_by_its_words_and_its_hash_names_it(name):
    spec, seen = stream(name), people()
    one, again, *others = (spec.of(["a", "b", "c"], seen, seed=s)[0] for s in (0, 0, 1, 2, 3, 4, 5))
    assert one.digest == again.digest
    assert torch.equal(one.x, again.x)
    drawn = name not in ("natural", "switch", "recurring", "gap")
    assert drawn == (len({o.digest for o in others} | {one.digest}) > 1)
    assert spec.of(["z", "b", "c"], seen, seed=0)[0].digest != one.digest
    assert stream(render(spec)) == spec


@pytest.mark.parametrize("name", ALL)
def test_recorded_windows_are_left_as_they_are_and_labels_stay_with_them(name):
    seen = people()
    kept = [p.x.clone() for p in seen]
    made = stream(name).of(["a", "b", "c"], seen, seed=0)
    assert all(torch.equal(p.x, k) for p, k in zip(seen, kept))
    assert [s.user for s in made] == ["a", "b", "c"]
    for i, s in enumerate(made):
        for x, y, who in zip(s.x, s.y, s.who):
            if name == "fault" or y == FOREIGN:
                continue
            owner = seen[(i + int(who)) % 3]
            row = int(x[0, 0]) % 1000
            assert torch.equal(x, owner.x[row])
            assert y == owner.y[row]


@given(n=st.integers(8, 80), classes=st.integers(1, 6), seed=st.integers(0, 50), name=st.sampled_from(OWN_WINDOWS_ONLY))
def test_an_order_is_a_permutation(n, classes, seed, name):
    own = person(n, classes=classes)
    made = stream(name).make("a", [own], seed)
    assert sorted(made.x[:, 0, 0].tolist()) == list(range(n))
    assert not made.who.any()


def changes(y):
    return int((y.diff() != 0).sum())


def test_label_correlation_is_what_the_specs_say():
    own = Examples(torch.rand(400, 2, 4), torch.arange(400) % 4, torch.zeros(400))

    def of(text):
        return stream(text).make("a", [own], 0).y

    assert changes(of("natural")) == 399
    assert changes(of("sorted")) == 3
    # Each of 4 chunks holds a class in one piece at most.
    assert changes(of("dirichlet:delta=0.01")) <= 15
    assert changes(of("ptta")) <= 15
    assert 200 < changes(of("iid")) < 399
    assert 400 / 25 / 3 < changes(of("bouts:length=25")) < 3 * 400 / 25
    assert changes(of("bouts:length=100")) < changes(of("bouts:length=5"))


def test_large_concentration_gives_chunks_with_all_classes_and_small_gives_hardly_any():
    own = Examples(torch.rand(400, 2), torch.arange(400) % 4, torch.zeros(400))

    def mean_classes(delta):
        chunks = [stream(f"dirichlet:delta={delta}").make("a", [own], s).y.chunk(4) for s in range(5)]
        return sum(len(c.unique()) for run in chunks for c in run) / 20

    assert mean_classes(1000) == 4
    assert mean_classes(0.01) < 3


def test_no_dirichlet_chunk_takes_more_once_it_is_full():
    # With all of a class in one place, ten equal classes fill ten chunks with one class each.
    y = np.arange(400) % 10
    for seed in range(10):
        chunks = stream("dirichlet:delta=0.001").chunks(y, np.random.default_rng(seed))
        sizes = [sum(map(len, chunk)) for chunk in chunks]
        assert sum(sizes) == 400
        assert max(sizes) < 80
        assert min(sizes) >= 10


def test_a_bout_is_followed_by_another_class():
    own = Examples(torch.rand(400, 2), torch.arange(400) % 2, torch.zeros(400))
    y = stream("bouts:length=1").make("a", [own], 0).y
    assert (y.diff() != 0).all()


def test_bouts_follow_their_prior():
    own = Examples(torch.rand(3000, 1), torch.arange(3000) % 3, torch.zeros(3000))
    y = stream("bouts:length=2:prior=8+1+1").make("a", [own], 0).y
    share = torch.bincount(y) / len(y)
    # From either rare class the next is the common one eight times in nine: .47, .26, .26 in the long run.
    assert share[0] > 0.42 > 0.32 > share[1]
    with pytest.raises(UserError, match="prior has 2 numbers and class 2 occurs; give one for each class"):
        stream("bouts:prior=1+1").make("a", [own], 0)


def test_switch_and_recurring_change_the_person_where_they_say():
    a, b = people(2)
    s = stream("switch:at=0.25").of(["a", "b"], [a, b], 0)[0]
    assert s.events == (Event(15, "switch"),)
    assert s.who.tolist() == [0] * 15 + [1] * 45
    assert s.x[:, 0, 0].tolist() == [*range(15), *range(1015, 1060)]
    r = stream("recurring:visits=2").of(["a", "b"], [a, b], 0)[0]
    assert [e.at for e in r.events] == [30, 60, 90]
    assert r.x[:, 0, 0].tolist() == [*range(30), *range(1000, 1030), *range(30, 60), *range(1030, 1060)]


def test_mixed_keeps_everybodys_order():
    s = stream("mixed:people=3").of(["a", "b", "c"], people(), 0)[0]
    for who in range(3):
        assert s.x[s.who == who, 0, 0].diff().eq(1).all()
    assert changes(s.who) > 60


def test_a_gap_loses_the_middle():
    s = stream("gap:missing=0.5").make("a", [person(60)], 0)
    assert s.x[:, 0, 0].tolist() == [*range(15), *range(45, 60)]
    assert s.events == (Event(15, "gap"),)


def test_a_fault_sticks_and_ends():
    own = Examples(torch.rand(60, 4, 5), torch.zeros(60, dtype=torch.int64), torch.zeros(60))
    s = stream("fault:lasting=0.2").make("a", [own], 0)
    assert s.events == (Event(20, "fault"), Event(32, "repair"))
    changed = (s.x != own.x).any(2)
    assert changed[20:32].sum(1).eq(2).all()
    assert not changed[:20].any()
    assert not changed[32:].any()
    stuck = changed[20].nonzero()[:, 0]
    assert torch.equal(s.x[25, stuck], own.x[19, stuck, -1:].expand(-1, 5))
    flat = stream("fault").make("a", [Examples(own.x[:, :, 0], own.y, own.recording)], 0)
    assert (flat.x != own.x[:, :, 0]).any(1).sum() == 12


def test_foreign_windows_are_marked_and_come_between():
    own = person(60)
    s = stream("foreign:portion=0.25").make("a", [own], 0)
    assert len(s) == 80
    assert torch.equal(s.x[s.y != FOREIGN], own.x)
    assert torch.equal(s.y[s.y != FOREIGN], own.y)
    random = Examples(torch.rand(30, 3, 8), torch.zeros(30, dtype=torch.int64), torch.zeros(30))
    strange = stream("foreign").make("a", [random], 0)
    pool = {tuple(sorted(row.tolist())) for row in random.x.flatten(1)}
    for row in strange.x[strange.y == FOREIGN].flatten(1):
        assert tuple(sorted(row.tolist())) in pool
        assert not (random.x.flatten(1) == row).all(1).any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("natrual", "unknown stream 'natrual'. Did you mean 'natural'?"),
        ("dirichlet:delta=0", "stream 'dirichlet': delta must be above 0, not 0"),
        ("ptta:gamma=-1", "gamma must be above 0, not -1"),
        ("bouts:length=0.5", "a bout lasts at least 1 window, length=0.5 does not"),
        ("bouts:prior=1+0", "stream 'bouts': prior 2 must be above 0, not 0"),
        ("switch:at=1", "stream 'switch': at is a share between 0 and 1, not 1"),
        ("gap:missing=0", "missing is a share between 0 and 1, not 0"),
        ("fault:lasting=2", "lasting is a share between 0 and 1, not 2"),
        ("foreign:portion=1", "portion is a share between 0 and 1, not 1"),
        ("recurring:visits=1", "visits must be at least 2, not 1"),
        ("mixed:people=1", "people must be at least 2, not 1"),
    ],
)
def test_what_a_user_can_get_wrong(text, message):
    with pytest.raises(UserError) as error:
        stream(text)
    assert message in str(error.value)


def test_too_few_people():
    with pytest.raises(UserError, match="stream 'recurring' takes 3 people and there are 2"):
        stream("recurring:people=3").of(["a", "b"], people(2), 0)


def test_a_stream_has_one_label_and_one_person_a_window():
    with pytest.raises(ValueError, match="2 windows, 1 labels, 2 persons"):
        Stream("a", torch.zeros(2, 1), torch.zeros(1), torch.zeros(2))


def test_the_hash_sees_every_part():
    base = stream("switch").of(["a", "b"], people(2), 0)[0]
    x, y, who = base.x.clone(), base.y.clone(), base.who.clone()
    x[3, 0, 0] += 1
    y[3] += 1
    who[3] += 1
    parts = [(x, base.y, base.who, base.events), (base.x, y, base.who, base.events)]
    parts += [(base.x, base.y, who, base.events), (base.x, base.y, base.who, ())]
    digests = {Stream("a", *p).digest for p in parts} | {base.digest}
    assert len(digests) == 5
