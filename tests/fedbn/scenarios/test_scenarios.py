"""Invariants of every discovered scenario, and the counts of the packaged ones."""

from __future__ import annotations

import io
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedbn.data.unpickle import Inert
from fedbn.errors import UserError
from fedbn.scenarios import glyphs, hapt, watch, wearable
from fedbn.scenarios.base import scenario, scenarios
from fedbn.scenarios.uci_har import SIGNALS
from fedbn.seeds import numpy_generator
from fedbn.tasks import parse_task
from tests.fedbn.helpers import rejects
from tests.fedbn.scenarios.archives import WRITERS
from tests.fedbn.scenarios.test_image_sets import write_cifar, write_idx
from tests.helpers import mostly_slow


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Scenario name -> options with which the scenario needs no download."""
    import datasets
    from PIL import Image

    directory = tmp_path_factory.mktemp("local")
    rng = numpy_generator(0, "test data")
    n = np.arange(120)
    x = rng.normal(size=(len(n), 3))
    np.savez(directory / "own.npz", x=x, y=n % 3, user=n // 20, recording=n // 10 % 2)
    images = [Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)) for _ in n]
    columns = {"image": images, "label": (n % 3).tolist(), "domain": [f"d{i % 4}" for i in n]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(directory / "hub"))
    write_uci_har(directory / "har")
    for name, write in WRITERS.items():
        write(directory / name, 8)
    write_idx(directory / "idx")
    write_cifar(directory / "cifar")
    return {
        **{name: f"{name}:path={directory / name}:unseen=1" for name in WRITERS},
        **{f"{name} cache": str(directory / "cache") for name in WRITERS},
        "idx": f"idx:path={directory / 'idx'}:users=4",
        "cifar": f"cifar:path={directory / 'cifar'}:users=4",
        "files": f"files:path={directory / 'own.npz'}",
        "hub": f"hub:path={directory / 'hub'}:size=8",
        "uci-har": f"uci-har:path={directory / 'har'}:unseen=2",
    }


def write_uci_har(directory, windows=36):
    """Write the layout of the archive: people 1 to 5 in train, 6 to 8 in test, activities cyclically."""
    rng = numpy_generator(0, "test archive")
    for part, people in (("train", range(1, 6)), ("test", range(6, 9))):
        (directory / part / "Inertial Signals").mkdir(parents=True)
        subject = np.repeat(list(people), windows)
        np.savetxt(directory / part / f"subject_{part}.txt", subject, fmt="%d")
        np.savetxt(directory / part / f"y_{part}.txt", np.arange(len(subject)) % 6 + 1, fmt="%d")
        for i, name in enumerate(SIGNALS):
            signal = i + 0.01 * rng.normal(size=(len(subject), 128))
            np.savetxt(directory / part / "Inertial Signals" / f"{name}_{part}.txt", signal, fmt="%.4f")


@lru_cache
def _load(text, seed):
    return scenario(text).load(seed)


@pytest.fixture
def load(texts, monkeypatch):
    def load(name, seed=0):
        text = texts.get(name, name)
        if name in WRITERS:  # the data of other scenarios stay in the cache
            monkeypatch.setenv("FEDBN_CACHE", texts[f"{name} cache"])
        try:
            return _load(text, seed)
        except UserError as error:
            if "is not installed" in str(error):
                pytest.skip(str(error))
            raise

    return load


def same_users(a, b):
    return [u.name for u in a.users] == [u.name for u in b.users] and all(
        torch.equal(getattr(getattr(p, side), part), getattr(getattr(q, side), part))
        for p, q in zip(a.users, b.users, strict=True)
        for side in ("train", "test")
        for part in ("x", "y", "recording")
    )


every = pytest.mark.parametrize("name", scenarios())


@pytest.mark.parametrize("name", mostly_slow(scenarios(), "digits8", "hapt", "watch", "imu", "files", "cifar"))
def test_scenario_seed_changes_unseen_users_only(name, load):
    """Loaded twice, data are the same to the last bit."""
    a, b = load(name), load(name, 1)
    assert same_users(a, b)
    assert (a.classes, a.sources) == (b.classes, b.sources)
    assert a.unseen
    assert a.seen
    assert not set(a.unseen) & set(b.unseen)
    assert sorted(a.seen + a.unseen) == list(range(len(a.users)))


@every
def test_scenario_examples_are_valid(name, load):
    population = load(name)
    task = parse_task(scenarios()[name].task)
    classified = task.name == "classification"
    train_classes = set()
    for i, user in enumerate(population.users):
        for data in (user.train, user.test):
            assert (data.x.dtype, data.recording.dtype) == (torch.float32, torch.int64)
            assert data.y.dtype in (torch.float32, torch.int64)
            assert len(data.x) == len(data.y) == len(data.recording) > 0
            assert data.x.shape[1:] == population.shape
            assert data.x.is_contiguous()
            assert torch.isfinite(data.x).all()
            assert task.check(data.y, population.classes) is None
        assert len(user.train) >= 2
        if classified and i in population.seen:
            train_classes |= set(user.train.y.tolist())
    assert not classified or train_classes == set(range(len(population.classes)))
    assert not task.notices(population)
    assert len({u.name for u in population.users}) == len(population.users)
    assert population.skew
    assert all(len(v) == 64 for v in population.sources.values())


@every
def test_scenario_has_no_example_on_both_sides(name, load):
    users = load(name).users
    train = {row.numpy().tobytes() for user in users for row in user.train.x}
    test = {row.numpy().tobytes() for user in users for row in user.test.x}
    assert not train & test


@pytest.mark.parametrize("name", ["hapt", "watch", "digits8", "files"])
def test_scenario_rows_are_in_order_of_recording(name, load):
    for user in load(name).users:
        for data in (user.train, user.test):
            assert (data.recording.diff() >= 0).all()


def test_hapt_has_known_counts(load):
    population = load("hapt")
    labels = [torch.cat([u.train.y, u.test.y]) for u in population.users]
    sizes = sorted(map(len, labels))
    assert (len(sizes), sum(sizes), sizes[0], sizes[-1]) == (30, 10_411, 284, 413)
    assert torch.cat(labels).bincount().tolist() == [1722, 1544, 1407, 1801, 1979, 1958]
    assert min(int(y.bincount().min()) for y in labels) == 36
    assert len(population.unseen) == 6
    for user in population.users:
        assert set(user.train.recording.tolist()) == {0}
        assert 0 not in user.test.recording
    # Gravity: the total acceleration is 1 g while a person stands still.
    standing = torch.cat([u.train.x[u.train.y == 4, :3] for u in population.users])
    assert standing.norm(dim=1).mean() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(("window", "count"), [(100, 13_704), (200, 6_216)])
def test_hapt_supports_other_windows(window, count, load):
    load("hapt")
    population = scenario(f"hapt:window={window}").load(0)
    assert sum(len(u.train) + len(u.test) for u in population.users) == count
    assert population.shape == (6, window)


def numbered_signal(rows):
    """Signal whose values are the row indices, so that the samples of a window can be identified."""
    return np.repeat(np.arange(rows, dtype=np.float32)[:, None], 6, axis=1)


def serve(monkeypatch, rows):
    """Let wearable scenarios load ``rows``."""
    monkeypatch.setattr(wearable, "cached", lambda *_: rows)
    monkeypatch.setattr(wearable, "fetch", lambda _: None)


def test_hapt_windows_stay_within_stretch_and_in_order(monkeypatch):
    lengths, labels = [40, 30, 7, 40, 50, 40], [0, 0, 1, 2, 0, 3]
    columns = {"label": labels, "user": [1] * 6, "recording": [0, 0, 0, 0, 1, 1], "stretch": range(6)}
    rows = {name: np.repeat(values, lengths) for name, values in columns.items()}
    stretch = rows["stretch"]
    serve(monkeypatch, rows | {"signal": numbered_signal(sum(lengths))})
    (user,) = hapt.Hapt(unseen=0, window=16).load(0).users
    assert [len(user.train), len(user.test)] == [4 + 2 + 0 + 4, 5 + 4]
    for data in (user.train, user.test):
        first, last = data.x[:, 0, 0].long(), data.x[:, 0, -1].long()
        assert (last - first == 15).all()
        assert (stretch[first] == stretch[last]).all()
        assert (first.diff() > 0).all()
        assert (data.y == torch.tensor(labels)[stretch[first]]).all()


def test_hapt_recordings_are_sorted_by_user():
    frames = {3: [_frame()], 1: [_frame(), _frame()]}
    assert [(u, r) for u, r, _, _ in hapt._recordings(frames)] == [(1, 0), (1, 1), (3, 0)]


def _frame():
    label = [-1, 1, 1, 7, 7, 1, 1, 2, 2, -1, 2, 2]
    manager, frame = Inert(), Inert()
    manager.state = (None, [numbered_signal(12).T, np.stack([np.arange(12), label])], None, None)
    frame.state = {"_data": manager}
    return frame


def test_hapt_separates_stretches_at_other_rows(monkeypatch):
    monkeypatch.setattr(hapt, "unpickle", lambda *_: {1: [_frame()] * 2})
    monkeypatch.setattr(hapt.gzip, "open", lambda _: io.BytesIO())
    rows = hapt.Hapt.parse(None)
    assert rows["label"].tolist() == [-1, 0, 0, 6, 6, 0, 0, 1, 1, -1, 1, 1] * 2
    assert np.unique(rows["stretch"], return_counts=True)[1].tolist() == [1, 2, 2, 2, 2, 1, 2] * 2
    assert rows["signal"][:, 0].tolist() == list(range(12)) * 2


def test_hapt_full_stream_has_all_later_windows(monkeypatch):
    lengths = [40, 20, 30, 10, 44]  # walk; walk, unlabeled, a transition, walk
    columns = {"label": [0, 0, -1, 6, 0], "user": [1] * 5, "recording": [0, 1, 1, 1, 1], "stretch": range(5)}
    rows = {name: np.repeat(values, lengths) for name, values in columns.items()}
    serve(monkeypatch, rows | {"signal": numbered_signal(sum(lengths))})
    labeled, full = (hapt.Hapt(unseen=0, window=16, stream=kind).load(0).users[0] for kind in ("labeled", "full"))
    assert same_users(SimpleNamespace(users=[labeled]), SimpleNamespace(users=[full]))
    assert labeled.stream is None
    assert full.stream.x[:, 0, 0].tolist() == list(range(40, 40 + 104 - 15, 8))
    # Samples 40 to 59 and 100 to 143 are labeled.
    assert full.stream.y.tolist() == [0] + 7 * [-1] + 4 * [0]
    assert set(full.stream.recording.tolist()) == {1}


def write_hapt(directory, samples=400):
    """Two recordings of two people with the layout of the archive; the acceleration counts the samples."""
    raw = directory / "RawData"
    raw.mkdir(parents=True)
    lines = []
    for experiment, user in enumerate((1, 1, 2, 2), 1):
        name = f"exp{experiment:02d}_user{user:02d}.txt"
        signal = np.repeat(np.arange(1.0, samples + 1)[:, None], 3, 1)
        np.savetxt(raw / f"acc_{name}", signal, fmt="%.6f")
        np.savetxt(raw / f"gyro_{name}", -signal, fmt="%.6f")
        lines += [f"{experiment} {user} {k} {60 * k - 9} {60 * k + 30}" for k in range(1, 7)]
        lines.append(f"{experiment} {user} 7 391 395")
    (raw / "labels.txt").write_text("\n".join(lines) + "\n")


def test_hapt_reads_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDBN_CACHE", str(tmp_path / "cache"))
    write_hapt(tmp_path)
    population = scenario(f"hapt:path={tmp_path}:window=20:unseen=1:stream=full").load(0)
    assert [u.name for u in population.users] == ["user01", "user02"]
    for user in population.users:
        # Labels name their first and last sample, counted from 1, as the acceleration does.
        for data in (user.train, user.test):
            assert data.x[::3, 0, 0].tolist() == [60 * k - 9 for k in range(1, 7)]
            assert data.x[2::3, 0, -1].tolist() == [60 * k + 30 for k in range(1, 7)]
            assert data.y.tolist() == [k for k in range(6) for _ in range(3)]
            assert torch.equal(data.x[:, 3:], -data.x[:, :3])
        assert len(user.stream) == 39


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda raw: (raw / "labels.txt").unlink(),
            "lacks acc_exp01_user01.txt, .* or labels.txt: download",
        ),
        (lambda raw: (raw / "labels.txt").write_text("1 2 3\n"), "3 columns instead of 5"),
        (lambda raw: (raw / "gyro_exp02_user01.txt").unlink(), "gyro_exp02_user01.txt is missing or is no table"),
        (lambda raw: (raw / "acc_exp01_user01.txt").write_text("1 2 3\n"), "acc_exp01_user01.txt and gyro.* in length"),
    ],
)
def test_hapt_rejects_incomplete_archive(tmp_path, damage, message):
    write_hapt(tmp_path)
    damage(tmp_path / "RawData")
    rejects(message, lambda: scenario(f"hapt:path={tmp_path}").load(0))


def test_watch_has_known_counts(load):
    population = load("watch")
    assert len(population.users) == 20
    assert [u.domain for u in population.users[:4]] == ["left", "right", "left", "right"]
    assert sum(len(u.train) + len(u.test) for u in population.users) == 3_107
    unseen = [population.users[i].name.split("-")[0] for i in population.unseen]
    assert (len(unseen), len(set(unseen))) == (4, 2)
    for user in population.users:
        assert set(user.train.y.tolist()) == set(user.test.y.tolist()) == set(range(7))


def test_watch_leaves_gap_between_training_and_test(monkeypatch):
    lengths = np.array([200, 171, 230, 190])
    columns = {"length": lengths, "subject": [1, 1, 2, 2], "side": [0, 1, 1, 0], "label": [3, 3, 3, 3]}
    rows = {name: np.array(values) for name, values in columns.items()}
    serve(monkeypatch, rows | {"signal": numbered_signal(int(lengths.sum()))})
    starts = np.cumsum(lengths) - lengths
    users = watch.Watch(unseen=0, window=32).load(0).users
    for user, recording in zip(users, (0, 1, 3, 2), strict=True):
        used = [data.x[:, 0].long() for data in (user.train, user.test)]
        half = (lengths[recording] - 32) // 2
        assert int(used[0].min()) == starts[recording]
        assert int(used[1].min()) == starts[recording] + half + 32
        assert starts[recording] + half - 16 <= int(used[0].max()) < starts[recording] + half
        assert int(used[1].min()) - int(used[0].max()) > 32
        assert int(used[1].max()) < starts[recording] + lengths[recording]


def test_digits_matches_setting_of_fedbn(load):
    population = load("digits")
    assert [u.name for u in population.users] == ["mnist", "optdigits", "mfeat", "pendigits", "fonts", "mnistm"]
    assert {len(u.train) for u in population.users} == {743}
    assert [len(u.test) for u in population.users] == [500, 1119, 400, 2195, 600, 500]
    for user in population.users:
        assert -1 <= user.train.x.min() <= user.train.x.max() <= 1
        assert torch.equal(user.train.x[:, 0], user.train.x[:, 1]) == (user.name != "mnistm")
        assert int(user.test.y.bincount(minlength=10).min()) >= 0.8 * len(user.test) / 10


def test_digits_shares_no_mnist_image_between_domains(monkeypatch):
    numbered = np.zeros((200, 28, 28), np.uint8), np.arange(200, dtype=np.uint8)
    monkeypatch.setattr(glyphs, "_mnist_all", lambda _: numbered)
    mnist, mnistm = (set(glyphs.DOMAINS[name]({})[1].tolist()) for name in ("mnist", "mnistm"))
    assert not mnist & mnistm
    assert mnist | mnistm == set(range(200))


def test_digits_fonts_name_the_version_that_has_them(monkeypatch):
    monkeypatch.setattr(glyphs, "FACES", ("none",))
    with pytest.raises(UserError, match="draws the typeface none: pip install 'matplotlib>="):
        glyphs._fonts({})


def test_digits_fonts_are_centered_and_of_the_size_of_mnist(monkeypatch):
    monkeypatch.setattr(glyphs, "FONT_IMAGES", 60)
    images, labels = glyphs._fonts({})
    assert labels.tolist() == [*range(10)] * 6
    for image in images:
        rows, columns = (np.flatnonzero((image > 64).any(axis)) for axis in (1, 0))
        for used in (rows, columns):
            assert abs((used[0] + used[-1]) / 2 - 13.5) < 3.5, "at most 2 px from the center, and rotated"
        assert 10 < rows[-1] - rows[0] < 24
        assert image.max() > 200


def test_digits_selects_unseen_by_name_and_limits_test(load):
    load("digits")
    population = scenario("digits:unseen=fonts+mnistm:train=50:test=30").load(3)
    assert [population.users[i].name for i in population.unseen] == ["fonts", "mnistm"]
    assert {(len(u.train), len(u.test)) for u in population.users} == {(50, 30)}


def test_digits8_has_different_cameras(load):
    population = load("digits8")
    assert sum(len(u.train) + len(u.test) for u in population.users) == 1_797
    assert float(torch.stack([u.train.x.mean() for u in population.users]).std()) > 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hapt:window=4", "window=4 is too short for a pattern; choose 8 samples or more"),
        ("hapt:overlap=1", "overlap=1.0 must be at least 0 and below 1"),
        ("hapt:window=3000", r"window=3000: user\d\d has no labeled stretch that long"),
        ("hapt:unseen=30", "30 unseen of 30 users leaves no user for training; choose 0 to 29"),
        ("watch:window=400", "the shortest recording has 947 samples.*choose 315 or less"),
        ("watch:unseen=10", "10 unseen of 10 users leaves no user for training"),
        ("digits:unseen=mnits", "unknown domain of scenario 'digits' 'mnits'. Did you mean 'mnist'?"),
        ("digits:unseen=mnist+optdigits+mfeat+pendigits+fonts+mnistm", "leaves no user for training; leave one out"),
        ("digits:train=5000", "train=5000: choose 10 to 2000, the size of domain 'mnist'"),
        ("digits:test=0", "test=0: choose 1 or more, or none"),
        ("digit-masks:unseen=mnits", "unknown domain of scenario 'digit-masks' 'mnits'. Did you mean 'mnist'?"),
        ("digit-sets:train=9", "train=9: choose 10 to 2000"),
        ("digit-angles:limit=181", "limit=181: choose an angle above 0 and at most 180 degrees"),
        ("hapt-intensity:unseen=30", "30 unseen of 30 users leaves no user for training"),
        ("digits8:users=99", "users=99: choose 2 to 60"),
        ("digits8:images=240", "images=240: choose 250 .25 per user. to 1797"),
        ("digits8:images=1798", "images=1798: choose 250"),
        ("digits8:unseen=10", "10 unseen of 10 users"),
    ],
)
def test_scenario_rejects_bad_input(text, message, load):
    load(text.split(":")[0])
    rejects(message, lambda: scenario(text).load(0))


def test_uci_har_merges_parts_of_archive(tmp_path):
    write_uci_har(tmp_path)
    population = scenario(f"uci-har:path={tmp_path}:unseen=2").load(0)
    assert [u.name for u in population.users] == [str(i) for i in range(1, 9)]
    assert population.shape == (9, 128)
    for user in population.users:
        assert (len(user.train), len(user.test)) == (17, 18)
        assert user.train.y.tolist() == [i % 6 for i in range(17)]
        # The values of channel i are about i: signals are stacked in the order of their names.
        assert user.test.x.mean((0, 2)).round().tolist() == list(range(9))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda har: None, "reads the directory 'UCI HAR Dataset'.*scenario hapt has the same people's"),
        (lambda har: (har / "test/y_test.txt").unlink(), "y_test.txt is missing or is not a table .*unpack"),
        (lambda har: (har / "test/y_test.txt").write_text("1 2\n3 4\n"), "has 2 columns, not 1"),
        (lambda har: (har / "train/y_train.txt").write_text("1\n2\n"), "files of train differ in length"),
    ],
)
def test_uci_har_rejects_incomplete_archive(tmp_path, damage, message):
    write_uci_har(tmp_path / "har", windows=12)
    damage(tmp_path / "har")
    path = tmp_path if "reads" in message else tmp_path / "har"
    rejects(message, lambda: scenario(f"uci-har:path={path}").load(0))
