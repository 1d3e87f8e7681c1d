"""Populations from files as people bring them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from fedbn.config import Plan
from fedbn.data.partition import repartition
from fedbn.data.shift import shift
from fedbn.data.splits import carve_validation
from fedbn.errors import UserError
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from fedbn.scenarios.base import scenario
from tests.fedbn.helpers import rejects

N, USERS = 96, np.repeat(list("abcd"), 24)


def table(**changed):
    """Four users with 24 rows each; the first value of each row is its number."""
    columns = {"x0": np.arange(N), "x1": np.arange(N) % 5, "y": np.arange(N) % 3, "user": USERS}
    return pd.DataFrame({k: v for k, v in (columns | changed).items() if v is not None})


@pytest.fixture
def load(tmp_path):
    def loaded(options="", seed=0, **changed):
        table(**changed).to_csv(tmp_path / "own.csv", index=False)
        return scenario(f"files:path={tmp_path / 'own.csv'}{options}").load(seed)

    return loaded


def numbers(data):
    return data.x[:, 0].int().tolist()


def assert_notice(population, *messages):
    assert len(population.notices) == len(messages)
    for notice, message in zip(population.notices, messages, strict=True):
        assert message in notice


def test_plain_data_need_no_notice(load):
    assert_notice(load())


@pytest.mark.parametrize(
    "labels", [np.arange(N) % 3 + 1, np.arange(N) % 3 * 2, np.array(["b", "a", "c"])[np.arange(N) % 3]]
)
def test_labels_are_mapped_with_a_notice(load, labels):
    population = load(y=labels)
    names = sorted(set(labels.tolist()))
    assert population.classes == tuple(map(str, names))
    for user in population.users:
        assert [names[i] for i in user.train.y.tolist()] == [labels[i] for i in numbers(user.train)]
    assert_notice(population, f"own.csv: labels {', '.join(map(str, names))} are classes 0, 1, 2")


def test_sorted_rows_are_split_by_class_with_a_notice(load):
    population = load(y=np.tile(np.repeat([0, 1, 2], 8), 4))
    for user in population.users:
        assert set(user.test.y.tolist()) == set(user.train.y.tolist()) == {0, 1, 2}
        assert min(abs(a - b) for a in numbers(user.train) for b in numbers(user.test)) == 2
    assert_notice(population, "rows of 4 of 4 users (a, b, c, d) come in long runs of one class")


def test_own_split_is_used_without_leak(load):
    part = np.tile(["Train"] * 12 + ["dev"] * 4 + ["TEST"] * 8, 4)
    for column in ("split", "Split", "subset"):
        population = load(**{column: part})
        assert sorted(n for u in population.users for n in numbers(u.train)) == np.flatnonzero(part == "Train").tolist()
        assert sorted(n for u in population.users for n in numbers(u.test)) == np.flatnonzero(part == "TEST").tolist()
        assert (
            sorted(n for u in population.users for n in numbers(u.validation)) == np.flatnonzero(part == "dev").tolist()
        )
        assert_notice(population, "own parts are used (48 to train, 32 to test, 16 for tuning only)")
    assert load(":split=", split=part).notices == ()
    rejects("column 'split' holds '0', which is not train, validation or test", load, split=np.arange(N) % 2)


def test_own_validation_rows_are_used_for_tuning(load):
    user = load(split=np.tile(["train"] * 12 + ["val"] * 4 + ["test"] * 8, 4)).users[0]
    carved = carve_validation(user)
    assert numbers(carved.train) == numbers(user.train)
    assert numbers(carved.test) == [12, 13, 14, 15]


def test_shift_applies_to_validation_rows(load):
    population = load(split=np.tile(["train"] * 12 + ["val"] * 4 + ["test"] * 8, 4))
    shifted = shift(population, "gain:strength=1", 0)
    for before, after in zip(population.users, shifted.users, strict=True):
        ratio = after.train.x[1, 0] / before.train.x[1, 0]
        torch.testing.assert_close(after.validation.x[:, 0], before.validation.x[:, 0] * ratio)
    assert shifted.notices == population.notices


def test_users_of_the_test_part_are_unseen(load):
    population = load(":unseen=2", split=np.repeat(["train", "train", "train", "test"], 24))
    assert [population.users[i].name for i in population.unseen] == ["d"]
    assert_notice(population, "4 users are in one part only and are split further", "test part only are unseen (d)")


def test_tiny_users_are_left_out_with_a_notice(load):
    users = np.where(np.arange(N) == N - 1, "eve", USERS)
    population = load(user=users)
    assert [u.name for u in population.users] == ["a", "b", "c", "d"]
    assert_notice(population, "1 of 5 users have too few rows and are left out: eve (1 row)")
    population = load(":least=24", user=users)
    assert [u.name for u in population.users] == ["a", "b", "c"]
    assert_notice(population, "2 of 5 users have too few rows and are left out: d (23 rows), eve (1 row)")
    rejects(r"and 25 in total \(least=25\). Check user=, or change test= or gap=", load, ":least=25")


def test_class_of_tiny_users_only_does_not_exist(load):
    last = np.arange(N) == N - 1
    population = load(user=np.where(last, "eve", USERS), y=np.where(last, 7, np.arange(N) % 3))
    assert population.classes == ("0", "1", "2")
    assert_notice(population, "eve (1 row)")


def test_single_recording_is_split_in_time_with_a_notice(load):
    recording = np.where(USERS == "a", 0, np.arange(N) % 24 // 6)
    population = load(recording=recording)
    assert numbers(population.users[0].test) == list(range(18, 24))
    assert_notice(population, "1 users have one recording and are split in time (a)")


def test_rows_without_users_need_a_partition(load):
    population = load(user=None)
    assert (population.pooled, population.unseen) == (True, ())
    assert_notice(population, "there is no column of users, so clients are made by --partition, and nobody is unseen")
    rejects("own.csv: there is no column of users; name it with user=NAME, or make", repartition, population, "", 0)
    dealt = repartition(population, "iid:clients=4", 0)
    assert not dealt.pooled
    assert len(dealt.users) == 4
    assert dealt.notices == population.notices
    train = sorted(n for u in dealt.users for n in numbers(u.train))
    assert train == numbers(population.users[0].train)
    assert load(":user=").pooled


def test_notices_reach_the_run(load, tmp_path):
    load(y=np.arange(N) % 3 + 1)
    run = Run(scenario=f"files:path={tmp_path / 'own.csv'}", strategy="fedbn", plan=Plan(batch_size=8)).resolved()
    assert build_context(run).notices[0] == "own.csv: labels 1, 2, 3 are classes 0, 1, 2"


def test_windows_are_cut_from_streams(load):
    streams = {"ax": np.arange(N), "t": np.arange(N) % 24 * 0.02, "x0": None, "x1": None, "y": np.arange(N) // 4 % 2}
    population = load(":x=ax:window=8:overlap=0.75", **streams)
    assert population.shape == (1, 8)
    for k, user in enumerate(population.users):
        train, test = (
            {24 * k + s for s in range(24)} & set(part.x.flatten().int().tolist()) for part in (user.train, user.test)
        )
        assert not train & test
        assert train | test <= set(range(24 * k, 24 * k + 24))
    assert_notice(
        population, "96 rows are cut into 36 windows of 8 samples, 2 apart; a window has its most frequent label"
    )
    assert "gaps" not in population.notices[0]


def test_shuffled_times_are_sorted(load):
    order = np.random.default_rng(0).permutation(N)
    stamp = pd.date_range("2020", periods=N, freq="s")[order].astype(str)
    population = load(x0=order, y=order % 3, user=USERS[order], timestamp=stamp)
    assert numbers(population.users[0].train) == list(range(17))
    assert_notice(population, "rows are not in order of time and are sorted")


def test_8_bit_images_are_scaled_like_those_of_a_dataset(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (N, 6, 5, 3)).astype(np.uint8)
    np.savez(tmp_path / "own.npz", x=pixels, y=np.arange(N) % 3, user=USERS)
    population = scenario(f"files:path={tmp_path / 'own.npz'}").load(0)
    wanted = torch.from_numpy(pixels[:17].transpose(0, 3, 1, 2).astype(np.float32) / 255)
    assert torch.equal(population.users[0].train.x, wanted)
    assert_notice(population, "has channels last and becomes [3, 6, 5]", "has 8 bits and is divided by 255")
    unchanged = scenario(f"files:path={tmp_path / 'own.npz'}:scale=1:layout=first").load(0)
    assert (unchanged.shape, unchanged.notices, float(unchanged.users[0].train.x.max())) == ((6, 5, 3), (), 255.0)


def test_ragged_series_are_padded_on_request(tmp_path):
    rows = [np.ones((2, 5 + i % 3)).tolist() for i in range(N)]
    pd.DataFrame({"x": rows, "y": np.arange(N) // 3 % 3, "user": USERS}).to_parquet(tmp_path / "own.parquet")
    rejects(
        r"row 0 has \[2, 5\], row 1 has \[2, 6\]\).*length=7",
        scenario(f"files:path={tmp_path / 'own.parquet'}").load,
        0,
    )
    population = scenario(f"files:path={tmp_path / 'own.parquet'}:length=6").load(0)
    assert population.users[0].train.x[:3, 0].tolist() == [[1] * 5 + [0], [1] * 6, [1] * 6]


def test_names_with_colons_are_options(load):
    population = load(":x=imu:acc_x+x0:y=y", **{"imu:acc_x": np.arange(N) * 2})
    assert population.users[0].train.x[3].tolist() == [6, 3]


def test_stray_bytes_are_no_other_encoding(load, tmp_path):
    load()
    text = (tmp_path / "own.csv").read_bytes()
    (tmp_path / "own.csv").write_bytes(text.replace(b"\n7,", b"\n7\0,"))
    scenario_text = f"files:path={tmp_path / 'own.csv'}"
    rejects(r"'x0' is not numeric: '7\\x00' in row 7; save numbers", scenario(scenario_text).load, 0)


def test_times_of_other_length_are_rejected(tmp_path):
    arrays = {"x": np.zeros((N, 2)), "y": np.arange(N) % 3, "user": USERS, "time": np.arange(N - 1)}
    np.savez(tmp_path / "own.npz", **arrays)
    rejects("times have 95 rows, x has 96; leave them out", scenario(f"files:path={tmp_path / 'own.npz'}").load, 0)


def test_missing_part_is_rejected(load):
    rejects(r"split is missing in 1 rows \(first: row 95\)", load, split=np.where(np.arange(N) < N - 1, "train", ""))


@pytest.mark.parametrize("option", ["scale=-1", "length=-1", "window=-1", "least=-1"])
def test_files_rejects_negative_options(load, option):
    with pytest.raises(UserError, match="must not be negative"):
        load(f":{option}")
