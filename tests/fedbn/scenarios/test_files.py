from __future__ import annotations

import re

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedbn.data.columns import Rows
from fedbn.data.population import build_population
from fedbn.errors import UserError
from fedbn.scenarios.base import scenario
from tests.fedbn.helpers import rejects


def columns():
    """Sixty rows in the order of recording; the first value of each row is its index."""
    n = np.arange(60)
    return {"x": np.stack([n, np.ones(60)], axis=1), "y": n % 3, "user": n * 3 // 60}


def with_lists(x):
    """Columns as lists, with other values ``x``."""
    return {k: v.tolist() for k, v in columns().items()} | {"x": x}


@pytest.fixture
def save(tmp_path):
    def saved(**changed):
        np.savez(tmp_path / "own.npz", **{k: v for k, v in (columns() | changed).items() if v is not None})
        return tmp_path / "own.npz"

    return saved


def load(path, options="", seed=0):
    return scenario(f"files:path={path}{':' if options else ''}{options}").load(seed)


def numbers(data):
    return data.x[:, 0].int().tolist()


def test_files_splits_in_time_without_recordings(save):
    population = load(save(), "unseen=1")
    assert [u.name for u in population.users] == ["0", "1", "2"]
    assert numbers(population.users[1].train) == list(range(20, 34))
    assert numbers(population.users[1].test) == list(range(35, 40))
    assert set(population.users[1].test.recording.tolist()) == {1}
    assert numbers(load(save(), "gap=3:test=0.5").users[0].train) == list(range(7))
    assert numbers(load(save(), "gap=0").users[0].train) == list(range(15))


def test_files_rejects_gap_that_leaves_no_training_rows(save):
    for gap, rows in ((14, 1), (15, 0), (16, 0), (20, 0), (99, 0)):
        rejects(f"user '0' has 20 rows, which leaves {rows} to train and 5 to test", load, save(), f"gap={gap}")
    assert numbers(load(save(), "gap=13").users[0].train) == [0, 1]


def test_files_uses_later_recordings_for_testing(save):
    path = save(recording=np.tile(["b"] * 5 + ["a"] * 9 + ["c"] * 6, 3))
    population = load(path)
    assert numbers(population.users[0].train) == list(range(14))
    assert population.users[0].train.recording.tolist() == [0] * 5 + [1] * 9
    assert set(population.users[0].test.recording.tolist()) == {2}
    assert numbers(load(path, "test=0.9").users[0].train) == list(range(5))
    assert len(load(path, "recording=").users[0].train) == 14


def test_files_accepts_interleaved_users(save):
    population = load(save(user=np.arange(60) % 3, y=np.arange(60) // 3 % 3))
    assert numbers(population.users[1].train) == list(range(1, 43, 3))
    assert numbers(population.users[1].test) == list(range(46, 60, 3))


def test_files_accepts_names_of_classes_and_users(save):
    population = load(save(y=np.array(["walk", "lie", "sit"] * 20), user=np.repeat(["eve", "bob", "ann"], 20)))
    assert population.classes == ("lie", "sit", "walk")
    assert [u.name for u in population.users] == ["ann", "bob", "eve"]
    assert population.users[2].train.y.tolist()[:4] == [2, 0, 1, 2]


def test_files_sorts_users_as_numbers(save):
    for users in ([10, 9, 2], [10.0, 9.0, 2.0]):
        assert [u.name for u in load(save(user=np.repeat(users, 20))).users] == ["2", "9", "10"]


def frame():
    """Columns with twelve numbered columns of values, not in the order of their numbers."""
    wide = {f"x{i}": np.arange(60.0) + 100 * i for i in (10, *range(10), 11)}
    return pd.DataFrame(wide | {k: v for k, v in columns().items() if k != "x"})


def test_files_gives_same_users_for_all_formats(save, tmp_path):
    data = columns() | {"recording": np.arange(60) // 5 % 4, "y": np.array(["walk", "lie", "sit"] * 20)}
    rest = {k: v.tolist() for k, v in data.items() if k != "x"}
    wide = pd.DataFrame({"x0": data["x"][:, 0], "x1": data["x"][:, 1], **rest})
    wide.to_csv(tmp_path / "own.csv", index=False)
    wide.to_parquet(tmp_path / "wide.parquet")
    pd.DataFrame({"x": data["x"].tolist(), **rest}).to_parquet(tmp_path / "lists.parquet")
    datasets.Dataset.from_dict({"x": data["x"].tolist(), **rest}).save_to_disk(str(tmp_path / "directory"))
    first = load(save(**data))
    for name in ("own.csv", "wide.parquet", "lists.parquet", "directory"):
        other = load(tmp_path / name)
        assert (other.unseen, other.classes) == (first.unseen, first.classes)
        assert [u.name for u in other.users] == [u.name for u in first.users]
        for a, b in zip(first.users, other.users, strict=True):
            for one, two in ((a.train, b.train), (a.test, b.test)):
                assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("x", "y", "recording"))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_files_selects_columns_and_shape(tmp_path, kind):
    path = tmp_path / f"own.{kind}"
    frame().to_csv(path, index=False) if kind == "csv" else frame().to_parquet(path)
    population = load(path)
    assert population.shape == (12,)
    assert population.users[0].train.x[3].tolist() == [3 + 100 * i for i in range(12)]
    assert load(path, "x=x1+x0").users[0].train.x[3].tolist() == [103, 3]
    assert load(path, "x=x0").users[0].train.x[3].tolist() == [3]
    assert load(path, "shape=3+4").users[0].train.x[3, 1].tolist() == [403, 503, 603, 703]
    assert list(population.sources) == [path.name]


def test_files_reads_parquet_lists_as_rows(tmp_path):
    table = pd.DataFrame(with_lists(columns()["x"].tolist()))
    table.to_parquet(tmp_path / "own.parquet")
    assert numbers(load(tmp_path / "own.parquet").users[0].train) == list(range(14))
    table.at[7, "x"] = [1.0]
    table.to_parquet(tmp_path / "own.parquet")
    message = r"rows of 'x' differ in shape \(row 0 has \[2\], row 7 has \[1\]\); bring them"
    rejects(message, load, tmp_path / "own.parquet")


def write_rows(rows, path):
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        datasets.Dataset.from_dict(rows).save_to_disk(str(path))


@pytest.mark.parametrize("kind", ["parquet", "directory"])
def test_files_reads_nested_lists_as_channels_and_samples(tmp_path, kind):
    path = tmp_path / f"own.{kind}"
    write_rows(with_lists([[[i, 1, 2], [3, 4, 5]] for i in range(60)]), path)
    user = load(path).users[0]
    assert user.train.x.shape == (14, 2, 3)
    assert user.train.x[7].tolist() == [[7, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("kind", ["parquet", "directory"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (None, "'x' is missing in 1 rows (first: row 3); fill or drop them"),
        ([[1.0, 2.0]], "rows of 'x' differ in shape (row 0 has [2, 2], row 3 has [1, 2]); bring them to one shape"),
        ([[1.0], [1.0, 2.0]], "row 3 of 'x' is ragged; bring its parts to one length"),
    ],
)
def test_files_rejects_bad_lists(tmp_path, kind, row, message):
    path = tmp_path / f"own.{kind}"
    write_rows(with_lists([row if i == 3 else [[1.0, 2.0]] * 2 for i in range(60)]), path)
    rejects(re.escape(message), load, path)


def test_files_reads_saved_dataset(tmp_path):
    features = datasets.Features(
        x=datasets.List(datasets.Value("float32")),
        y=datasets.ClassLabel(names=["walk", "sit", "lie"]),
        user=datasets.Value("int64"),
    )
    table = datasets.Dataset.from_dict(with_lists(columns()["x"].tolist()), features=features)
    table.save_to_disk(str(tmp_path / "one"))
    population = load(tmp_path / "one")
    assert population.classes == ("walk", "sit", "lie")
    assert numbers(population.users[0].train) == list(range(14))
    datasets.DatasetDict({"first": table, "second": table}).save_to_disk(str(tmp_path / "two"))
    message = r"two holds 2 splits \(first, second\), which are not train, .*; name one: path=.*two/first"
    rejects(message, load, tmp_path / "two")
    assert population.sources["one"] == load(tmp_path / "two" / "first").sources["first"]


def test_files_reads_images_channels_first(tmp_path):
    write_rows(with_lists([Image.new("RGB", (5, 4), (255, 0, 51)) for _ in range(60)]), tmp_path / "rgb")
    population = load(tmp_path / "rgb")
    assert population.shape == (3, 4, 5)
    torch.testing.assert_close(population.users[0].train.x[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


def test_files_rejects_bad_images(tmp_path):
    write_rows(with_lists([Image.new("RGB", (5, 5 if i == 9 else 4)) for i in range(60)]), tmp_path / "sizes")
    rejects(r"differ in shape \(row 0 has \[4, 5, 3\], row 9 has \[5, 5, 3\]\)", load, tmp_path / "sizes")
    broken = datasets.Dataset.from_dict(with_lists([{"bytes": b"no image", "path": None}] * 60))
    broken.cast_column("x", datasets.Image()).save_to_disk(str(tmp_path / "broken"))
    rejects("'x' holds an image that cannot be decoded; save it again", load, tmp_path / "broken")


def test_files_sources_depend_on_content(save):
    before = load(save()).sources
    assert before == load(save()).sources
    assert before != load(save(x=columns()["x"] + 1)).sources


@given(st.lists(st.integers(6, 40), min_size=2, max_size=6), st.floats(0.05, 0.6), st.integers(0, 2))
def test_build_population_uses_each_row_once_or_drops_gap(sizes, test, gap):
    n = sum(sizes)
    users = np.repeat(np.arange(len(sizes)), sizes)
    rows = Rows(np.arange(n, dtype=np.float32)[:, None], np.arange(n) % 2, users, None)
    options = {
        "name": "t",
        "test": test,
        "gap": gap,
        "skew": "",
        "sources": {},
        "by_class": False,
    }
    try:
        split = build_population(rows, unseen=1, seed=0, **options)
    except UserError as error:
        assert "has" in str(error) or "class" in str(error) or "leaves no user" in str(error)  # noqa: PT017
        return
    kept = [i for i, size in enumerate(sizes) if size - max(1, round(test * size)) - gap >= 2]
    assert [int(user.name) for user in split.users] == kept
    for user in split.users:
        size, train, test = sizes[int(user.name)], numbers(user.train), numbers(user.test)
        assert len(train) + gap + len(test) == size
        assert test[0] - train[-1] == gap + 1
        assert train == sorted(train)


ERRORS = [
    ({}, "test=1", "test=1.0 must be a share between 0 and 1"),
    ({}, "gap=-1", "gap=-1 must not be negative"),
    ({}, "unseen=3", "3 unseen of 3 users leaves no user for training; choose 0 to 2"),
    ({}, "y=lable", "unknown column for y 'lable'. Known: user, x, y. Set it with y=NAME"),
    ({"label": np.arange(60), "y": None}, "y=lable", "'lable'. Did you mean 'label'?"),
    ({"user": None}, "user=person", "unknown column for user 'person'"),
    ({}, "recording=session", "unknown column for recording 'session'"),
    ({}, "x=acc", "unknown column for x 'acc'. Known: user, x, y. Set it with x=NAME, x=A+B or x=FIRST..LAST"),
    ({}, "shape=2+2", "own.npz: shape=2+2 needs 4 values per example, but rows have 2"),
    (
        {"x": np.where(np.arange(120).reshape(60, 2) % 50 == 7, np.nan, 1.0)},
        "",
        "x holds 3 NaN or infinite values (first: row 3, position 1); remove or impute them",
    ),
    ({"x": np.full((60, 1), 1e300)}, "", "x holds 60 NaN or infinite values (first: row 0, position 0)"),
    ({"x": np.full((60, 1), "abc")}, "", "own.npz: 'x' is not numeric: "),
    ({"x": np.ones((60, 1), complex)}, "", "own.npz: 'x' is not numeric but has type complex128; save real numbers"),
    ({"x": np.full((60, 1), np.datetime64("2020-01-01"))}, "", "'x' is not numeric but has type datetime64[D]"),
    ({"x": np.ones((60, 0))}, "", "own.npz: an example of x has no values (shape [0]); save some"),
    ({"x": 5.0}, "", "'x' is a single value, but x needs one value per row; set x=NAME"),
    ({"user": 3}, "", "'user' is a single value, but user needs one value per row; set user=NAME"),
    ({"y": np.arange(60) / 2}, "", "labels are real numbers (0.5 in row 1), as for regression, but classes are needed"),
    ({"y": np.where(np.arange(60) < 58, 1.0, np.nan)}, "", "label is missing in 2 rows (first: row 58)"),
    ({"y": np.zeros((60, 2))}, "", "labels have shape [60, 2] and row 0 has 0 classes (multi-label)"),
    ({"user": np.where(np.arange(60) < 58, 1.0, np.nan)}, "", "user is missing in 2 rows (first: row 58)"),
    ({"y": np.arange(59) % 3}, "", "x has 60 rows, y has 59 rows, user has 60 rows; they need the same number"),
    ({k: v[:0] for k, v in columns().items()}, "", "own.npz has no rows"),
    ({"user": np.arange(60) // 2}, "", "user '0' has 2 rows, which leaves 0 to train and 1 to test"),
]


@pytest.mark.parametrize(("changed", "options", "message"), ERRORS)
def test_files_rejects_bad_input(save, changed, options, message):
    rejects(re.escape(message), lambda: load(save(**changed), options))


def test_files_rejects_unreadable_files(tmp_path):
    rejects("scenario 'files' needs a path: files:path=FILE", lambda: scenario("files").load(0))
    rejects(r"there is no file '.*none\.npz'; check path=", load, tmp_path / "none.npz")
    (tmp_path / "own.xlsx").write_text("")
    rejects(r"own\.xlsx: data are read from .npz, .csv, .parquet, .* not from '.xlsx'", load, tmp_path / "own.xlsx")
    for name in ("own.npz", "own.parquet"):
        (tmp_path / name).write_bytes(b"")
        rejects(rf"{name} cannot be read \(.*\); write it again or check its suffix", load, tmp_path / name)
    (tmp_path / "folder").mkdir()
    rejects(r"folder holds no data files; save .npz, .csv or .parquet files there", load, tmp_path / "folder")


def test_files_rejects_python_objects(tmp_path):
    ragged = np.array([np.zeros(2), np.zeros(3)], dtype=object)
    np.savez(tmp_path / "own.npz", x=ragged, y=[0, 1], user=[0, 0])
    rejects("array 'x' holds Python objects, for instance rows of different lengths", load, tmp_path / "own.npz")


def test_files_rejects_text_in_number_columns(tmp_path):
    for text in ("n/k", "1\0"):
        table = frame().astype({"x3": object})
        table.loc[5, "x3"] = text
        table.to_csv(tmp_path / "own.csv", index=False)
        rejects(re.escape(f"own.csv: 'x3' is not numeric: {text!r} in row 5"), load, tmp_path / "own.csv")


def test_build_population_rejects_class_beyond_names():
    rows = Rows(np.zeros((4, 1)), np.array([0, 1, 2, 5]), np.zeros(4), None, ("a", "b", "c"))
    rejects(
        "labels run from 0 to 5, but classes must be numbered 0 to 2",
        build_population,
        rows,
        name="t",
        test=0.5,
        gap=0,
        unseen=0,
        seed=0,
        skew="",
        sources={},
    )


def test_files_names_the_sensors_of_a_worn_device(save):
    path = save(x=np.random.default_rng(0).normal(size=(60, 7, 8)))
    assert load(path, "triples=0+1+2+5+4+3").triples == ((0, 1, 2), (5, 4, 3))
    assert load(path).triples == ()
    for text in ("0+1", "0+1+1", "0+1+7"):
        rejects(r"must name three channels of each sensor once.*\[7, 8\]", load, path, f"triples={text}")
    rejects("must name three channels", load, save(), "triples=0+1+2")
