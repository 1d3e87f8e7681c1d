"""Directories of data files."""

from __future__ import annotations

from itertools import product

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedbn.data.folders import read
from fedbn.data.readers import content_digest
from tests.fedbn.helpers import rejects

datasets.disable_progress_bars()


def write(root, *names, rows=2, **more):
    """Files whose value ``x`` is the number of the file."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        frame = pd.DataFrame({"x": [i] * rows, "y": [0] * rows, **more})
        if path.suffix == ".npz":
            np.savez(path, **{c: frame[c].to_numpy() for c in frame})
        elif path.suffix == ".parquet":
            frame.to_parquet(path)
        else:
            frame.to_csv(path, index=False)
    return read(root)


def rows_of(columns):
    names = [n for n in ("split", "user", "recording") if n in columns.names]
    return [
        tuple(row) for row in zip(columns.get("x").tolist(), *(columns.get(n).tolist() for n in names), strict=True)
    ]


@pytest.mark.parametrize(
    ("names", "origins"),
    [
        (["ana.csv", "bob.parquet", "cid.npz", "dan.csv.gz"], ["ana", "bob", "cid", "dan"]),
        (["user2.csv", "user10.csv"], ["user2", "user10"]),
        (["user=ana/part-0.parquet", "user=bob/part-0.parquet"], ["ana", "bob"]),
        (["ana/s1.csv", "ana/s2.csv", "bob/s1.csv"], [("ana", "s1"), ("ana", "s2"), ("bob", "s1")]),
        (["train.csv", "test.csv"], ["train", "test"]),
        (["walk_train.csv", "walk_valid.csv", "walk_test.csv"], ["train", "validation", "test"]),
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            ["train", "train", "test"],
        ),
        (["train/part-0.parquet", "train/part-1.parquet", "test/part-0.parquet"], ["train", "train", "test"]),
        (
            [f"{s}/{u}.csv" for s, u in product(("train", "test"), ("ana", "bob"))],
            [("train", "ana"), ("train", "bob"), ("test", "ana"), ("test", "bob")],
        ),
        (
            [f"{u}_{s}.csv" for s, u in product(("Train", "Test"), ("ana", "bob"))],
            [("train", "ana"), ("train", "bob"), ("test", "ana"), ("test", "bob")],
        ),
        (["test1.csv", "test2.csv"], ["test1", "test2"]),
        (["all.csv"], [()]),
    ],
)
def test_names_of_files_give_users_recordings_and_splits(tmp_path, names, origins):
    found = write(tmp_path, *names)
    wanted = [(i, *([origin] if isinstance(origin, str) else origin)) for i, origin in enumerate(origins)]
    assert sorted(rows_of(found)) == [row for row in wanted for _ in range(2)]
    assert bool(found.notices) == (names != ["all.csv"])


def test_columns_come_before_names_of_files(tmp_path):
    found = write(tmp_path, "a.csv", "b.csv", user=["eve", "fay"])
    assert found.get("user").tolist() == ["eve", "fay", "eve", "fay"]
    assert not found.notices


def test_directory_ignores_other_files(tmp_path):
    for name in ("README.txt", "notes.md", ".hidden.csv", "_SUCCESS"):
        (tmp_path / name).write_text("not a table")
    assert rows_of(write(tmp_path, "ana.csv", "bob.csv")) == [(0, "ana"), (0, "ana"), (1, "bob"), (1, "bob")]


def test_directory_leaves_out_files_without_rows(tmp_path):
    write(tmp_path, "ana.csv", "bob.csv")
    (tmp_path / "cid.csv").write_text("x,y\n")
    found = read(tmp_path)
    assert found.get("user").tolist() == ["ana", "ana", "bob", "bob"]
    assert f"{tmp_path.name}: cid.csv without rows, left out" in found.notices


def test_directory_rejects_files_that_do_not_fit(tmp_path):
    write(tmp_path, "ana.csv")
    pd.DataFrame({"x": [1], "label": [0]}).to_csv(tmp_path / "bob.csv")
    rejects("bob.csv has no column 'y' but .*, x, label; give all files the same", lambda: read(tmp_path).get("y"))
    (tmp_path / "bob.csv").write_text("")
    rejects("bob.csv is empty", read, tmp_path)


def test_directory_of_images_names_the_scenario(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    rejects("read directories of images with hub:data=", read, tmp_path)


def test_digest_of_directory_depends_on_names_and_content(tmp_path):
    write(tmp_path / "a", "ana.csv", "bob.csv")
    write(tmp_path / "b", "ana.csv", "bob.csv")
    assert content_digest(tmp_path / "a") == content_digest(tmp_path / "b")
    (tmp_path / "b" / "bob.csv").rename(tmp_path / "b" / "eve.csv")
    assert content_digest(tmp_path / "a") != content_digest(tmp_path / "b")
    write(tmp_path / "a", "ana.csv", "bob.csv", rows=3)
    write(tmp_path / "b", "ana.csv", "bob.csv", rows=4)
    assert content_digest(tmp_path / "a") != content_digest(tmp_path / "b")


def test_npz_joins_arrays_of_splits(tmp_path):
    parts = {"x_train": [1, 2], "y_train": [0, 1], "x_test": [3], "y_test": [0]}
    np.savez(tmp_path / "keras.npz", **parts)
    found = read(tmp_path / "keras.npz")
    assert rows_of(found) == [(1, "train"), (2, "train"), (3, "test")]
    np.savez(tmp_path / "first.npz", train_x=[1, 2], val_x=[4], test_x=[3])
    assert rows_of(read(tmp_path / "first.npz")) == [(1, "train"), (2, "train"), (4, "validation"), (3, "test")]
    np.savez(tmp_path / "other.npz", x=[1], x_mean=[0], test_time=[3])
    assert sorted(read(tmp_path / "other.npz").names) == ["test_time", "x", "x_mean"]
    np.savez(tmp_path / "lacking.npz", **{k: v for k, v in parts.items() if k != "y_test"})
    rejects("its parts train, test have different arrays", read, tmp_path / "lacking.npz")


def test_saved_dataset_joins_its_splits(tmp_path):
    splits = {"train": [1, 2], "valid": [4], "test": [3]}
    tables = {name: datasets.Dataset.from_dict({"x": x, "y": x}) for name, x in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "own"))
    assert rows_of(read(tmp_path / "own")) == [(1, "train"), (2, "train"), (4, "validation"), (3, "test")]


def images(root, *made):
    table = datasets.Dataset.from_dict({"x": list(made)})
    table.save_to_disk(str(root))
    return read(root).get("x")


def test_images_are_read_in_their_mode(tmp_path):
    def pixels(dtype, *shape):
        return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)

    for kind, array in (("L", pixels(np.uint8, 3, 2)), ("16", pixels(np.uint16, 3, 2))):
        found = images(tmp_path / kind, Image.fromarray(array))
        assert (found.dtype, found[0, 0].tolist()) == (array.dtype, array.tolist())
    rgba = pixels(np.uint8, 3, 2, 4)
    assert np.array_equal(images(tmp_path / "rgba", Image.fromarray(rgba))[0], rgba.transpose(2, 0, 1))
    palette = Image.new("RGB", (2, 3), (204, 0, 0)).convert("P")
    assert images(tmp_path / "palette", palette)[0, :, 0, 0].tolist() == [204, 0, 0]
    assert images(tmp_path / "bits", Image.new("1", (2, 3), 1)).max() == 255
    mixed = Image.fromarray(pixels(np.uint8, 3, 2)), Image.fromarray(pixels(np.uint16, 3, 2))
    rejects("'x' mixes images of uint16 and uint8; save all in one type", images, tmp_path / "mixed", *mixed)
