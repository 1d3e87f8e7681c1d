"""Laws for every scenario that is found, and the counts of the packaged ones."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import pytest
import torch

from fedbn.errors import UserError
from fedbn.scenarios import digits, hapt, watch
from fedbn.scenarios.base import scenario, scenarios
from fedbn.scenarios.uci_har import SIGNALS
from fedbn.seeds import numpy_generator


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """How to name each scenario so that it needs neither a download nor options."""
    import datasets
    from PIL import Image

    place = tmp_path_factory.mktemp("local")
    rng = numpy_generator(0, "test data")
    n = 120
    np.savez(
        place / "own.npz",
        x=rng.normal(size=(n, 3)),
        y=np.arange(n) % 3,
        user=np.arange(n) // 20,
        recording=np.arange(n) // 10 % 2,
    )
    images = [Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8).astype(np.uint8)) for _ in range(n)]
    columns = {"image": images, "label": (np.arange(n) % 3).tolist(), "domain": [f"d{i % 4}" for i in range(n)]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(place / "hub"))
    write_uci_har(place / "har")
    return {
        "files": f"files:path={place / 'own.npz'}",
        "hub": f"hub:path={place / 'hub'}:size=8",
        "uci-har": f"uci-har:path={place / 'har'}:unseen=2",
    }


def write_uci_har(place, windows=36):
    """The archive's layout: people 1 to 5 in train, 6 to 8 in test, activities in turn."""
    rng = numpy_generator(0, "test archive")
    for part, population in (("train", range(1, 6)), ("test", range(6, 9))):
        (place / part / "Inertial Signals").mkdir(parents=True)
        subject = np.repeat(list(population), windows)
        np.savetxt(place / part / f"subject_{part}.txt", subject, fmt="%d")
        np.savetxt(place / part / f"y_{part}.txt", np.arange(len(subject)) % 6 + 1, fmt="%d")
        for i, name in enumerate(SIGNALS):
            signal = i + 0.01 * rng.normal(size=(len(subject), 128))
            np.savetxt(place / part / "Inertial Signals" / f"{name}_{part}.txt", signal, fmt="%.4f")


@lru_cache
def _load(text, seed):
    return scenario(text).load(seed)


@pytest.fixture
def load(texts):
    def loaded(name, seed=0, again=False):
        text = texts.get(name, name)
        try:
            return scenario(text).load(seed) if again else _load(text, seed)
        except UserError as error:
            if "is not installed" in str(error):
                pytest.skip(str(error))
            raise

    return loaded


def same_users(a, b):
    return [u.name for u in a.users] == [u.name for u in b.users] and all(
        torch.equal(getattr(getattr(p, side), part), getattr(getattr(q, side), part))
        for p, q in zip(a.users, b.users, strict=True)
        for side in ("train", "test")
        for part in ("x", "y", "recording")
    )


every = pytest.mark.parametrize("name", scenarios())


@every
def test_the_same_seed_gives_the_same_people(name, load):
    a, b = load(name), load(name, again=True)
    assert same_users(a, b)
    assert (a.unseen, a.classes, a.skew, a.sources) == (b.unseen, b.classes, b.skew, b.sources)


@every
def test_the_seed_decides_who_is_unseen_and_nothing_else(name, load):
    a, b = load(name), load(name, 1)
    assert same_users(a, b)
    assert a.sources == b.sources
    assert a.unseen
    assert a.seen
    assert not set(a.unseen) & set(b.unseen)
    assert sorted(a.seen + a.unseen) == list(range(len(a.users)))


@every
def test_examples_are_well_formed(name, load):
    population = load(name)
    trained = set()
    for i, user in enumerate(population.users):
        for data in (user.train, user.test):
            assert data.x.dtype == torch.float32
            assert data.y.dtype == data.recording.dtype == torch.int64
            assert len(data.x) == len(data.y) == len(data.recording) > 0
            assert data.x.shape[1:] == population.shape
            assert data.x.is_contiguous()
            assert torch.isfinite(data.x).all()
            assert 0 <= int(data.y.min()) <= int(data.y.max()) < len(population.classes)
        assert len(user.train) >= 2
        if i in population.seen:
            trained |= set(user.train.y.tolist())
    assert trained == set(range(len(population.classes)))
    assert len({u.name for u in population.users}) == len(population.users)
    assert population.skew
    assert all(len(v) == 64 for v in population.sources.values())


@every
def test_no_example_is_on_both_sides(name, load):
    for user in load(name).users:
        train, test = ({row.numpy().tobytes() for row in data.x} for data in (user.train, user.test))
        assert not train & test


@pytest.mark.parametrize("name", ["hapt", "watch", "digits8", "files"])
def test_rows_are_in_the_order_of_their_recordings(name, load):
    for user in load(name).users:
        for data in (user.train, user.test):
            assert (data.recording.diff() >= 0).all()


def test_hapt_is_the_hapt_we_know(load):
    population = load("hapt")
    whole = [torch.cat([u.train.y, u.test.y]) for u in population.users]
    sizes = sorted(map(len, whole))
    assert len(population.users) == 30
    assert sum(sizes) == 10_411
    assert (sizes[0], sizes[-1]) == (284, 413)
    assert torch.cat(whole).bincount().tolist() == [1722, 1544, 1407, 1801, 1979, 1958]
    assert min(int(y.bincount().min()) for y in whole) == 36
    assert len(population.unseen) == 6
    for user in population.users:
        assert set(user.train.recording.tolist()) == {0}
        assert 0 not in user.test.recording
    # Gravity: somebody standing still measures 1 g in total.
    standing = torch.cat([u.train.x[u.train.y == 4, :3] for u in population.users])
    assert standing.norm(dim=1).mean() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(("window", "count"), [(100, 13_704), (200, 6_216)])
def test_hapt_at_other_windows(window, count, load):
    load("hapt")
    population = scenario(f"hapt:window={window}").load(0)
    assert sum(len(u.train) + len(u.test) for u in population.users) == count
    assert population.shape == (6, window)


def counting(rows):
    """Rows whose signal is their own number, so that a window tells which samples it holds."""
    return np.repeat(np.arange(rows, dtype=np.float32)[:, None], 6, axis=1)


def test_hapt_windows_stay_inside_a_stretch_and_in_order(monkeypatch):
    lengths, labels, recordings = [40, 30, 7, 40, 50, 40], [0, 0, 1, 2, 0, 3], [0, 0, 0, 0, 1, 1]
    stretch = np.repeat(np.arange(6), lengths)
    rows = {
        "signal": counting(sum(lengths)),
        "label": np.repeat(labels, lengths),
        "user": np.ones(sum(lengths), int),
        "recording": np.repeat(recordings, lengths),
        "stretch": stretch,
    }
    monkeypatch.setattr(hapt, "cached", lambda *_: rows)
    monkeypatch.setattr(hapt, "fetch", lambda _: None)
    (user,) = hapt.Hapt(unseen=0, window=16).load(0).users
    assert [len(user.train), len(user.test)] == [4 + 2 + 0 + 4, 5 + 4]
    for data in (user.train, user.test):
        first, last = data.x[:, 0, 0].long(), data.x[:, 0, -1].long()
        assert (last - first == 15).all()
        assert (stretch[first] == stretch[last]).all()
        assert (first.diff() > 0).all()
        assert (data.y == torch.tensor(labels)[stretch[first]]).all()


def test_hapt_parses_labels_into_stretches():
    signal = counting(12)
    label = np.array([-1, 1, 1, 7, 7, 1, 1, 2, 2, -1, 2, 2])
    population = {3: [_frame(signal, label)], 1: [_frame(signal, label), _frame(signal, label)]}
    got = hapt._recordings(population)
    assert [(u, r) for u, r, _, _ in got] == [(1, 0), (1, 1), (3, 0)]


def _frame(signal, label):
    from fedbn.data.unpickle import Inert

    manager, frame = Inert(), Inert()
    manager.state = (None, [signal.T, np.stack([np.arange(len(label)), label])], None, None)
    frame.state = {"_data": manager}
    return frame


def test_hapt_does_not_join_stretches_across_what_was_dropped(monkeypatch):
    label = np.array([-1, 1, 1, 7, 7, 1, 1, 2, 2, -1, 2, 2])
    monkeypatch.setattr(hapt, "unpickle", lambda *_: {1: [_frame(counting(12), label)] * 2})
    monkeypatch.setattr(hapt.gzip, "open", lambda _: io.BytesIO())
    rows = hapt._parse(None)
    assert rows["label"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1] * 2
    runs = np.unique(rows["stretch"], return_counts=True)[1]
    assert runs.tolist() == [2, 2, 2, 2] * 2
    assert rows["signal"][:, 0].tolist() == [1, 2, 5, 6, 7, 8, 10, 11] * 2


def test_watch_is_the_watch_we_know(load):
    population = load("watch")
    assert len(population.users) == 20
    assert [u.domain for u in population.users[:4]] == ["left", "right", "left", "right"]
    assert sum(len(u.train) + len(u.test) for u in population.users) == 3_107
    away = [population.users[i].name.split("-")[0] for i in population.unseen]
    assert len(away) == 4
    assert len(set(away)) == 2
    for user in population.users:
        assert set(user.train.y.tolist()) == set(user.test.y.tolist()) == set(range(7))


def test_watch_leaves_a_windows_gap_between_training_and_test(monkeypatch):
    lengths = np.array([200, 171, 230, 190])
    rows = {
        "signal": counting(int(lengths.sum())),
        "length": lengths,
        "subject": np.array([1, 1, 2, 2]),
        "side": np.array([0, 1, 1, 0]),
        "label": np.array([3, 3, 3, 3]),
    }
    monkeypatch.setattr(watch, "cached", lambda *_: rows)
    monkeypatch.setattr(watch, "fetch", lambda _: None)
    starts = np.cumsum(lengths) - lengths
    users = watch.Watch(unseen=0, window=32).load(0).users
    for user, recording in zip(users, (0, 1, 3, 2), strict=True):
        used = [data.x[:, 0].long() for data in (user.train, user.test)]
        assert int(used[0].min()) == starts[recording]
        assert int(used[1].min()) - int(used[0].max()) > 32
        assert int(used[1].max()) < starts[recording] + lengths[recording]


def test_digits_is_the_setting_of_fedbn(load):
    population = load("digits")
    assert [u.name for u in population.users] == ["mnist", "optdigits", "mfeat", "pendigits", "fonts", "mnistm"]
    assert {len(u.train) for u in population.users} == {743}
    assert [len(u.test) for u in population.users] == [500, 1119, 400, 2195, 600, 500]
    for user in population.users:
        assert user.train.x.min() >= -1
        assert user.train.x.max() <= 1
        gray = torch.equal(user.train.x[:, 0], user.train.x[:, 1])
        assert gray == (user.name != "mnistm")
        assert int(user.test.y.bincount(minlength=10).min()) >= 0.8 * len(user.test) / 10


def test_digits_shares_no_image_of_mnist_between_domains(monkeypatch):
    numbered = np.zeros((200, 28, 28), np.uint8), np.arange(200, dtype=np.uint8)
    monkeypatch.setattr(digits, "_mnist_all", lambda _: numbered)
    mnist, mixed = (set(digits.DOMAINS[name]({})[1].tolist()) for name in ("mnist", "mnistm"))
    assert not mnist & mixed
    assert mnist | mixed == set(range(200))


def test_digits_unseen_by_name_and_a_cap_on_tests(load):
    load("digits")
    population = scenario("digits:unseen=fonts+mnistm:train=50:test=30").load(3)
    assert [population.users[i].name for i in population.unseen] == ["fonts", "mnistm"]
    assert {(len(u.train), len(u.test)) for u in population.users} == {(50, 30)}


def test_digits8_has_different_cameras_and_equal_labels(load):
    population = load("digits8")
    assert sum(len(u.train) + len(u.test) for u in population.users) == 1_797
    means = torch.stack([u.train.x.mean() for u in population.users])
    assert float(means.std()) > 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hapt:window=4", "window=4 is too short for a pattern; choose 8 samples or more"),
        ("hapt:overlap=1", "overlap=1.0 must be at least 0 and below 1"),
        ("hapt:window=3000", r"window=3000: user\d\d has no labeled stretch that long"),
        ("hapt:unseen=30", "30 unseen of 30 users leaves nobody to train; choose 0 to 29"),
        ("watch:window=400", "the shortest recording has 947 samples.*choose 315 or less"),
        ("watch:unseen=10", "10 unseen of 10 users leaves nobody to train"),
        ("digits:unseen=mnits", "unknown domain of scenario 'digits' 'mnits'. Did you mean 'mnist'?"),
        ("digits:unseen=mnist+optdigits+mfeat+pendigits+fonts+mnistm", "leaves nobody to train; leave one out"),
        ("digits:train=5000", "train=5000: choose 10 to 2000, what domain 'mnist' has"),
        ("digits:test=0", "test=0: choose 1 or more, or none"),
        ("digits8:users=99", "users=99: choose 2 to 60"),
        ("digits8:images=240", "images=240: choose 250 .25 a user. to 1797"),
        ("digits8:images=1798", "images=1798: choose 250"),
        ("digits8:unseen=10", "10 unseen of 10 users"),
    ],
)
def test_an_impossible_scenario_names_the_fix(text, message, load):
    load(text.split(":")[0])
    with pytest.raises(UserError, match=message):
        scenario(text).load(0)


def test_the_archive_of_uci_har_is_put_together(tmp_path):
    write_uci_har(tmp_path)
    population = scenario(f"uci-har:path={tmp_path}:unseen=2").load(0)
    assert [u.name for u in population.users] == [str(i) for i in range(1, 9)]
    assert population.shape == (9, 128)
    for user in population.users:
        assert (len(user.train), len(user.test)) == (17, 18)
        assert user.train.y.tolist() == [i % 6 for i in range(17)]
        # Channel i is i: signals are stacked in the order of their names.
        assert user.test.x.mean((0, 2)).round().tolist() == list(range(9))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda place: None, "reads the directory 'UCI HAR Dataset'.*scenario hapt has the same people's"),
        (lambda place: (place / "test" / "y_test.txt").unlink(), "y_test.txt is missing or no table .*unpack"),
        (lambda place: (place / "test" / "y_test.txt").write_text("1 2\n3 4\n"), "has 2 columns, not 1"),
        (lambda place: (place / "train" / "y_train.txt").write_text("1\n2\n"), "files of train differ in length"),
    ],
)
def test_archives_that_are_not_whole(tmp_path, spoil, message):
    write_uci_har(tmp_path / "har", windows=12)
    spoil(tmp_path / "har")
    path = tmp_path if "reads" in message else tmp_path / "har"
    with pytest.raises(UserError, match=message):
        scenario(f"uci-har:path={path}").load(0)
