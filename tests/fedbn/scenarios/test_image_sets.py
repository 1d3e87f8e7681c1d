"""Published image data sets, from small files in their formats."""

from __future__ import annotations

import gzip
import pickle

import numpy as np
import pytest

from fedbn.data.images import read_idx
from fedbn.scenarios import idx
from fedbn.scenarios.base import scenario
from tests.fedbn.helpers import rejects

SIZES = {"train": 80, "test": 40}


def idx_bytes(values):
    sizes = np.array(values.shape, ">u4").tobytes()
    return b"\0\0\x08" + bytes([values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def images_of(part, side=28):
    """Image i of a part has the value i in its first row, and is black elsewhere."""
    n = SIZES[part]
    images = np.zeros((n, side, side), np.uint8)
    images[:, 0] = np.arange(n)[:, None] + 100 * (part == "test")
    return images, np.arange(n) % 10


def write_idx(directory, prefix="", names=("train", "t10k"), dot="-", compress=True):
    """The four files of an IDX data set."""
    directory.mkdir(parents=True)
    for part, name in zip(("train", "test"), names, strict=True):
        for kind, values in zip(("images-idx3", "labels-idx1"), images_of(part), strict=True):
            file = f"{prefix}{name}-{kind}-ubyte".replace("-idx", f"{dot}idx")
            data = idx_bytes(values)
            (directory / (file + ".gz" * compress)).write_bytes(gzip.compress(data) if compress else data)


def write_cifar(directory, coarse=False):
    """The files of CIFAR-10, or of CIFAR-100 with the coarse class 0 and five fine classes."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    train, test = ("train", "test") if coarse else ("data_batch_{}", "test_batch")
    for name in [train] if coarse else [train.format(i) for i in range(1, 6)]:
        _write_rows(directory / f"{name}.bin", 80, coarse, rng)
    _write_rows(directory / f"{test}.bin", 40, coarse, rng)
    names = "apple\nbear\nbee\nbed\nbus\n" if coarse else "plane\ncar\nbird\ncat\ndeer\n"
    (directory / ("fine_label_names.txt" if coarse else "batches.meta.txt")).write_text(names + "\n")


def _write_rows(path, n, coarse, rng):
    rows = rng.integers(0, 256, (n, 1 + coarse + 3072), np.uint8)
    rows[:, 0], rows[:, int(coarse)] = 0, np.arange(n) % 5
    path.write_bytes(rows.tobytes())


@pytest.mark.parametrize(
    ("data", "folder", "layout"),
    [
        ("mnist", "MNIST/raw", {"compress": False}),
        ("kmnist", "", {}),
        ("fashion-mnist", "fashion-mnist", {"dot": "."}),
        ("emnist-balanced", "EMNIST/raw", {"prefix": "emnist-balanced-", "names": ("train", "test")}),
    ],
)
def test_idx_reads_images_of_published_parts(tmp_path, data, folder, layout):
    write_idx(tmp_path / "root" / folder, **layout)
    population = scenario(f"idx:data={data}:path={tmp_path / 'root'}:users=4").load(0)
    assert population.shape == (1, 28, 28)
    assert len(population.classes) == 10
    for part, size in SIZES.items():
        x, y = (np.concatenate([getattr(getattr(u, part), k).numpy() for u in population.users]) for k in "xy")
        pixels = np.round((x[:, 0] + 1) * 127.5).astype(int)
        top = pixels[:, :, 0] if data.startswith("emnist") else pixels[:, 0]
        assert (top == top[:, :1]).all(), "EMNIST is stored transposed"
        number = top[:, 0] - 100 * (part == "test")
        assert sorted(number.tolist()) == list(range(size))
        assert (y == number % 10).all()
    assert not (np.diff(population.users[0].train.x[:, 0].amax((1, 2)).numpy()) > 0).all(), "random order"


def test_idx_finds_files_and_pools_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "ROOTS", (tmp_path / "none", tmp_path / "data"))
    write_idx(tmp_path / "data" / "FashionMNIST" / "raw")
    population = scenario("idx:users=2:split=pooled:unseen=0").load(0)
    assert [(len(u.train), len(u.test)) for u in population.users] == [(45, 15), (45, 15)]
    assert any((u.train.x.amax((1, 2, 3)) > 100 / 127.5 - 1).any() for u in population.users)
    assert population.notices == ("fashion-mnist: the files are not the published ones",)
    small = scenario("idx:users=2:images=20").load(0)
    assert [sum(len(getattr(u, part)) for u in small.users) for part in ("train", "test")] == [20, 20]


@pytest.mark.slow
@pytest.mark.skipif(not (idx.ROOTS[1] / "fashion-mnist").exists(), reason="dataset-fashion-mnist is not installed")
def test_published_fashion_mnist_is_recognized():
    population = scenario("idx:images=500").load(0)
    assert population.notices == ()
    assert [sum(len(getattr(u, part)) for u in population.users) for part in ("train", "test")] == [500, 500]


@pytest.mark.parametrize("coarse", [False, True])
def test_cifar_reads_binary_version(tmp_path, coarse):
    write_cifar(tmp_path / "cifar", coarse)
    population = scenario(f"cifar:path={tmp_path / 'cifar'}:users=2").load(0)
    assert population.shape == (3, 32, 32)
    assert population.classes[0] == ("apple" if coarse else "plane")
    assert sum(len(u.train) for u in population.users) == (80 if coarse else 400)
    assert sum(len(u.test) for u in population.users) == 40
    first = np.frombuffer((tmp_path / "cifar" / f"test{'' if coarse else '_batch'}.bin").read_bytes(), np.uint8)
    image = first[1 + coarse : 3073 + coarse].reshape(3, 32, 32) / 127.5 - 1
    assert any(np.allclose(x, image, atol=1e-6) for u in population.users for x in u.test.x.numpy())


def test_image_sets_refuse_damaged_and_unknown_files(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw", compress=False)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    text = f"idx:data=mnist:path={tmp_path}"
    images.write_bytes(images.read_bytes()[:-1])
    rejects(r"62719 bytes of data, but its header says \[80, 28, 28\]; download it again", scenario(text).load, 0)
    images.write_bytes(b"<html>not found</html>")
    rejects("is not an IDX file of bytes; download it again", scenario(text).load, 0)
    images.write_bytes(idx_bytes(np.zeros((3, 28, 28))))
    rejects("do not belong together; download the files again", scenario(text).load, 0)
    images.unlink()
    rejects("has no file train-images-idx3-ubyte", scenario(text).load, 0)
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"1234")[:-6])
    rejects("cannot be read", read_idx, tmp_path / "broken.gz")
    rejects("no IDX files of kmnist in .*KMNIST/raw", scenario(f"idx:data=kmnist:path={tmp_path / 'MNIST'}").load, 0)
    rejects("Did you mean 'mnist'", scenario(f"idx:data=mnst:path={tmp_path}").load, 0)
    rejects("split=x: choose published or pooled", scenario("idx:split=x").load, 0)
    rejects("at least 1 user with 2 images each", scenario("idx:users=20:images=30").load, 0)


def test_cifar_refuses_pickles_and_damaged_files(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({}))
    rejects("Python version of CIFAR, whose pickles can run any code", scenario(f"cifar:path={tmp_path}").load, 0)
    (tmp_path / "data_batch_1").unlink()
    rejects("has neither data_batch_1.bin", scenario(f"cifar:path={tmp_path}").load, 0)
    rejects("reads the unpacked binary version, not 'no path'", scenario("cifar").load, 0)
    write_cifar(tmp_path / "whole")
    (tmp_path / "whole" / "test_batch.bin").write_bytes(b"12345")
    rejects("5 bytes, which is no multiple of 3073", scenario(f"cifar:path={tmp_path / 'whole'}").load, 0)
    (tmp_path / "whole" / "data_batch_3.bin").unlink()
    rejects("data_batch_3.bin cannot be read", scenario(f"cifar:path={tmp_path / 'whole'}").load, 0)
