"""Scenario hub: local directories, a mocked hub, and errors without a connection."""

from __future__ import annotations

import datasets
import flwr_datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fedbn.scenarios.base import scenario
from fedbn.scenarios.hub import COLLECTIONS
from tests.fedbn.helpers import rejects

datasets.disable_progress_bars()


def table(n=80, image="image", label="label", **more):
    """Images whose gray level is their index; sorted by class, as often on the hub."""
    images = [Image.new("L", (8, 6), i) for i in range(n)]
    columns = {image: images, label: (np.arange(n) * 4 // n).tolist(), **more}
    names = ["cat", "dog", "elk", "fox"]
    return datasets.Dataset.from_dict(columns).cast_column(label, datasets.ClassLabel(names=names))


def domains():
    """Images of four domains in turn."""
    return table(domain=[f"d{i % 4}" for i in range(80)])


def numbers(data):
    return ((data.x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.fixture
def pacs(tmp_path):
    domains().save_to_disk(str(tmp_path / "pacs"))
    return tmp_path / "pacs"


@pytest.fixture
def online(monkeypatch):
    """A mocked hub with one table for all data sets; returns the list of requested settings."""
    requested = []

    class Hub:
        def __init__(self, **settings):
            requested.append(settings)

        def load_split(self, split):
            if split != "train":
                raise ValueError(split)
            requested[-1]["split"] = split
            return domains()

    monkeypatch.setattr(flwr_datasets, "FederatedDataset", Hub)
    return requested


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(path, options="", seed=0):
    return scenario(f"hub:path={path}{':' if options else ''}{options}").load(seed)


def test_hub_uses_domains_as_users(pacs):
    population = load(pacs)
    assert [u.name for u in population.users] == ["d0", "d1", "d2", "d3"]
    assert population.shape == (3, 64, 64)
    assert population.classes == ("cat", "dog", "elk", "fox")
    assert population.skew == COLLECTIONS["pacs"].skew
    for i, user in enumerate(population.users):
        assert (len(user.train), len(user.test)) == (16, 4)
        used = numbers(user.train) + numbers(user.test)
        assert sorted(used) == list(range(i, 80, 4))
        assert used != sorted(used)
        assert user.train.y.tolist() == [number * 4 // 80 for number in numbers(user.train)]


def test_hub_uses_splits_of_the_data_set(tmp_path):
    rows = domains()
    test = list(range(0, 80, 3))
    parts = {"train": rows.select([i for i in range(80) if i not in test]), "test": rows.select(test)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "pacs"))
    population = load(tmp_path / "pacs")
    for i, user in enumerate(population.users):
        assert sorted(numbers(user.train)) == [n for n in range(i, 80, 4) if n not in test]
        assert sorted(numbers(user.test)) == [n for n in range(i, 80, 4) if n in test]


def test_hub_applies_size_and_limits(pacs):
    population = load(pacs, "size=4:limit=10:users=3:unseen=0:test=0.3")
    assert population.shape == (3, 4, 4)
    assert [(len(u.train), len(u.test)) for u in population.users] == [(7, 3)] * 3


def test_hub_assigns_rows_at_random_without_users(tmp_path):
    table(image="img").save_to_disk(str(tmp_path / "cifar"))
    population = load(tmp_path / "cifar", "data=cifar10:users=4")
    assert population.shape == (3, 32, 32)
    assert len(population.users) == 4
    assert sorted(i for u in population.users for i in numbers(u.train) + numbers(u.test)) == list(range(80))


def test_hub_uses_parts_as_users(tmp_path):
    for part in COLLECTIONS["digits-four"].parts:
        table(40).save_to_disk(str(tmp_path / part.domain))
    population = load(tmp_path, "data=digits-four")
    assert [u.name for u in population.users] == ["mnist", "mnistm", "svhn", "usps"]
    assert population.shape == (3, 28, 28)


def write_folders(directory, domains, classes=("a", "b", "c", "d"), each=10):
    for domain in domains:
        for i, name in enumerate(classes):
            (directory / domain / name).mkdir(parents=True)
            for k in range(each):
                Image.new("RGB", (8, 6), (i, i, i)).save(directory / domain / name / f"{k}.png")


def test_hub_reads_domains_from_directories(tmp_path):
    write_folders(tmp_path, ["amazon", "caltech", "dslr", "webcam"])
    population = load(tmp_path, "data=office-caltech10:size=8")
    assert [u.name for u in population.users] == ["amazon", "caltech", "dslr", "webcam"]
    assert population.classes == ("a", "b", "c", "d")
    for user in population.users:
        assert user.train.y.tolist() == numbers(user.train)


def test_hub_loads_missing_domains_online(tmp_path, online):
    write_folders(tmp_path, ["synth"], classes=("cat", "dog", "elk", "fox"))
    population = load(tmp_path, "data=digits-five")
    assert [u.name for u in population.users] == ["mnist", "mnistm", "svhn", "synth", "usps"]
    names = ["ylecun/mnist", "flwrlabs/usps", "ufldl-stanford/svhn", "Mike0307/MNIST-M"]
    assert [settings["dataset"] for settings in online] == names


def test_hub_rejects_domain_without_copy(tmp_path):
    message = "'amazon' has no reliable copy on the hub; unpack .* set path=DIR, where DIR/amazon has one"
    rejects(message, lambda: scenario("hub:data=office-caltech10").load(0))
    rejects(message, load, tmp_path, "data=office-caltech10")


def test_hub_rejects_different_class_names(tmp_path):
    write_folders(tmp_path, ["amazon", "caltech", "dslr"])
    write_folders(tmp_path, ["webcam"], classes=("a", "b", "c", "mug"))
    message = r"class names differ between domains \(a, b, c, d / a, b, c, mug\)"
    rejects(message, load, tmp_path, "data=office-caltech10")


def test_hub_reads_other_data_set_by_columns(tmp_path):
    writers = [f"w{i % 5:02d}" for i in range(80)]
    datasets.DatasetDict({"train": table(image="scan", label="sign", hand=writers)}).save_to_disk(str(tmp_path / "d"))
    population = load(tmp_path / "d", "data=own/one:x=scan:y=sign:user=hand:size=6")
    assert [u.name for u in population.users] == [f"w{i:02d}" for i in range(5)]
    assert list(population.sources) == ["hub/own/one"]


def test_hub_reads_folder_with_load_dataset(tmp_path):
    (tmp_path / "d").mkdir()
    domains().to_parquet(str(tmp_path / "d" / "train.parquet"))
    assert len(load(tmp_path / "d").users) == 4


def test_hub_reads_train_split_unshuffled(online):
    assert len(scenario("hub").load(0).users) == 4
    settings = {"dataset": "flwrlabs/pacs", "subset": None, "partitioners": {"train": 1}, "shuffle": False}
    assert online == [settings | {"split": "train"}]


def test_hub_suggests_alternatives_offline(monkeypatch):
    def unreachable(**_):
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(flwr_datasets, "FederatedDataset", unreachable)
    message = (
        r"cannot load 'flwrlabs/femnist' from the hub \(ConnectionError: Couldn't reach the Hub\)\. Check name and "
        r"connection\. To work offline, .*save_to_disk\(DIR\) .* copy DIR here and add path=DIR; or use .*: digits8"
    )
    rejects(message, lambda: scenario("hub:data=femnist").load(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("data=pacss", r"unknown data set of scenario 'hub' \(or give owner/name\) 'pacss'. Did you mean 'pacs'\?"),
        ("size=-1", "hub: size=-1, users=20, limit=500: choose"),
        ("users=0", "users=0"),
        ("limit=2", "3 rows per user or more"),
    ],
)
def test_hub_rejects_bad_options(options, message):
    rejects(message, lambda: scenario(f"hub:{options}").load(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("user=domian", r"unknown column of pacs 'domian'. Did you mean 'domain'\?"),
        ("x=img", "unknown column of pacs 'img'.* Set it with x=NAME"),
        ("x=domain", "column 'domain' holds no images but str; set x=COLUMN"),
        ("unseen=4", "4 unseen of 4 users"),
    ],
)
def test_hub_rejects_bad_columns(pacs, options, message):
    rejects(message, load, pacs, options)


@pytest.mark.parametrize(
    ("column", "rows", "message"),
    [
        ("label", [None] + [0] * 79, r"pacs: label is missing in 1 rows .*; fill or drop them"),
        ("domain", [None] * 2 + ["d"] * 78, r"pacs: user is missing in 2 rows \(first: row 0\); fill or drop them"),
        ("label", [0.5] * 80, r"labels are real numbers \(0.5 in row 0\), as for regression, but classes are needed"),
        ("image", [{"bytes": b"no image", "path": None}] * 80, "'image' holds an image that cannot be decoded; save"),
    ],
)
def test_hub_rejects_bad_rows(tmp_path, column, rows, message):
    columns = {"image": [Image.new("L", (8, 6))] * 80, "label": [0] * 80, "domain": ["a", "b"] * 40, column: rows}
    dataset = datasets.Dataset.from_dict(columns)
    if column == "image":
        dataset = dataset.cast_column("image", datasets.Image())
    dataset.save_to_disk(str(tmp_path / "own"))
    rejects(message, load, tmp_path / "own")


def test_hub_accepts_class_names(tmp_path):
    names = [f"c{i % 3}" for i in range(80)]
    columns = {"image": [Image.new("L", (8, 6), i) for i in range(80)], "label": names, "domain": ["a", "b"] * 40}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "own"))
    population = load(tmp_path / "own", "size=4")
    assert population.classes == ("c0", "c1", "c2")
    for user in population.users:
        assert user.train.y.tolist() == [number % 3 for number in numbers(user.train)]


def test_hub_rejects_bad_directories(tmp_path):
    rejects(r"there is no directory '.*none'", load, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    rejects(r"empty cannot be read as a data set \(.*\); write it with save_to_disk", load, tmp_path / "empty")
    datasets.DatasetDict({"valid": table(8)}).save_to_disk(str(tmp_path / "other"))
    rejects(r"has no split 'train' but valid; name the split: .*other/SPLIT", load, tmp_path / "other")


def test_hub_sources_depend_on_content(pacs, tmp_path):
    before = load(pacs, "size=4").sources
    domains().save_to_disk(str(tmp_path / "copy"))
    assert load(tmp_path / "copy", "size=4").sources == before
    table(domain=[f"d{i % 4}" for i in range(80)][::-1]).save_to_disk(str(tmp_path / "inverted"))
    assert load(tmp_path / "inverted", "size=4").sources != before
    assert torch.equal(load(pacs).users[0].train.x, load(pacs).users[0].train.x)
