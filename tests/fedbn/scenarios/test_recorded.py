"""Scenarios of downloaded recordings, on small files with the layout of the archives."""

from __future__ import annotations

import pytest
import torch

from fedbn.errors import UserError
from fedbn.scenarios import opportunity, pamap2
from fedbn.scenarios.base import scenario
from tests.fedbn.helpers import rejects
from tests.fedbn.scenarios.archives import WRITERS, write_wisdm

NAMES = ("pamap2", "harth", "wisdm", "opportunity")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDBN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Directory of each archive, written when it is first used."""
    directories = {}

    def archive(name):
        if name not in directories:
            directories[name] = tmp_path_factory.mktemp(name)
            WRITERS[name](directories[name], 8)
        return directories[name]

    return archive


@pytest.mark.parametrize("name", NAMES)
def test_recorded_windows_have_units_labels_and_sensors(name, archives):
    population = scenario(f"{name}:path={archives(name)}:unseen=1").load(0)
    channels = 3 if name == "harth" else 6
    assert (len(population.users), population.shape[0]) == (2, channels)
    assert population.triples == ((0, 1, 2), (3, 4, 5))[: channels // 3]
    for user in population.users:
        classes = set(user.train.y.tolist())
        assert classes == set(user.test.y.tolist()) == set(range(len(population.classes)))
        # Gravity is 1 g along one axis in every window, which shows units, columns and that no window mixes bouts.
        for part in (user.train, user.test):
            size = part.x[:, :3].mean(2).abs().sort(1).values
            assert torch.allclose(size, torch.tensor([0.0, 0.0, 1.0]).expand_as(size), atol=0.03)
            if channels == 6:  # the rotation is the position of the bout, and its remainder by 3 the axis of gravity
                position = part.x[:, 3].mean(1).round()
                assert torch.equal(position % 3, part.x[:, :3].mean(2).abs().argmax(1).float())
    # Classes and bouts occur in the same order.
    if name in ("wisdm", "harth"):
        first = population.users[0].train
        axes = [int(first.x[first.y == k, :3].mean((0, 2)).argmax()) for k in range(len(population.classes))]
        assert axes == [k % 3 for k in range(len(population.classes))]


@pytest.mark.parametrize(
    ("options", "shape"), [("place=hand", (6, 128)), ("rate=25:window=64:overlap=0.25", (6, 64))], ids=str
)
def test_recorded_options_select_sensor_and_rate(options, shape, archives):
    population = scenario(f"pamap2:path={archives('pamap2')}:unseen=1:{options}").load(0)
    assert population.shape == shape
    sign = -1 if "hand" in options else 1
    x = population.users[0].train.x[:, :3].mean(2)
    assert torch.equal(x.sum(1).sign(), torch.full((len(x),), float(sign)))


def test_pamap2_windows_do_not_cross_lost_packets(archives):
    notices = " ".join(scenario(f"pamap2:path={archives('pamap2')}:unseen=1").load(0).notices)
    assert "one of 2 gaps in time" in notices, "one long gap per person; short ones are interpolated"


def test_opportunity_tests_on_the_last_two_days(archives):
    population = scenario(f"opportunity:path={archives('opportunity')}").load(0)
    assert [user.name for user in population.users] == ["S1", "S2"]
    for user in population.users:
        assert (user.train.recording.unique().tolist(), user.test.recording.unique().tolist()) == ([0, 1, 2, 3], [4, 5])
    assert [p.stem for p in sorted(map(pamap2.Path, ("S1-ADL2", "S1-Drill", "S1-ADL1")), key=opportunity._order)] == [
        "S1-Drill",
        "S1-ADL1",
        "S1-ADL2",
    ]


def replace_first(path, pattern, old, new):
    file = sorted(path.glob(pattern))[0]
    file.write_text(file.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("pamap2", None, r"reads PAMAP2_Dataset/Protocol/subject\*.dat, and .* has no such files: download"),
        ("pamap2", ("Protocol/*", " 0 0 0\n", " 0 0\n"), "subject101.dat does not have the columns of PAMAP2_Dataset"),
        ("pamap2", ("Protocol/*", "5.12 1 ", "5.12 33 "), "subject101.dat holds the label 33.0, which"),
        ("pamap2", ("Protocol/*", "5.13 1 ", "x 1 "), "subject101.dat does not have the columns"),
        ("harth", ("S*", "back_x", "hip_x"), "S006.csv does not have the columns of harth"),
        ("harth", ("S*", "2019-01-12 00:00:00.020", "monday"), "S006.csv holds a timestamp that is no date"),
        ("wisdm", ("raw/phone/accel/*", ",A,", ",N,"), "holds the label 'N', which wisdm-dataset does not have"),
        ("wisdm", ("raw/phone/gyro/*", ";", "no;"), "data_1600_gyro_phone.txt has a line that is no sample"),
        ("opportunity", ("dataset/*", "0 NaN ", "0 "), "S1-ADL1.dat does not have the columns"),
    ],
)
def test_recorded_rejects_wrong_archives(name, damage, message, tmp_path):
    if damage is not None:
        WRITERS[name](tmp_path, 0.2)
        replace_first(tmp_path, *damage)
    text = f"{name}:path={tmp_path}:unseen=1"
    with pytest.raises(UserError, match=message) as error:
        scenario(text).load(0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "pamap2",
            "no path is given: download the archive from https://doi.org/10.24432/C5NW2H, unpack it and set pam",
        ),
        ("harth:rate=0", "rate=0 must be above 0 samples per second"),
        ("wisdm:place=shoe", "place"),
    ],
)
def test_recorded_rejects_bad_options(text, message):
    rejects(message, lambda: scenario(text).load(0))


def test_wisdm_without_rotation_is_refused(tmp_path):
    write_wisdm(tmp_path, 0.2)
    next((tmp_path / "raw/phone/gyro").glob("*1600*")).unlink()
    rejects("data_1600_gyro_phone.txt is missing", lambda: scenario(f"wisdm:path={tmp_path}").load(0))
