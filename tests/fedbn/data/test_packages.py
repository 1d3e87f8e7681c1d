from __future__ import annotations

import hashlib
import io
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbn.data import packages
from fedbn.data.packages import SOURCES, cache_dir, cached, fetch, locate, status
from fedbn.data.unpickle import ARRAYS, FRAMES, Inert, unpickle
from fedbn.errors import UserError


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

    class Distribution:
        def locate_file(self, file):
            return tmp_path / file

    monkeypatch.setattr(packages, "distribution", lambda name: Distribution())
    return replace(SOURCES["mnist"], file="data.csv", sha256=hashlib.sha256(content).hexdigest())


def test_locate_suggests_install_command():
    source = replace(SOURCES["hapt"], package="no-such-package==1.0")
    with pytest.raises(
        UserError, match=r"no-such-package==1\.0, which is not installed\. Install it: pip install --no-de"
    ):
        locate(source)


def test_fetch_rejects_missing_file(installed, tmp_path):
    (tmp_path / "data.csv").unlink()
    with pytest.raises(UserError, match="is not installed"):
        fetch(installed)


def test_fetch_rejects_changed_content(installed, tmp_path):
    assert fetch(installed) == tmp_path / "data.csv"
    (tmp_path / "data.csv").write_bytes(b"1,2,4\n")
    with pytest.raises(UserError, match=r"data\.csv of mlxtend==0\.25\.0 is corrupted .* --force-reinstall"):
        fetch(installed)


def test_status_lists_every_file_without_raising(monkeypatch):
    assert {name for name, _, _ in status()} == set(SOURCES)
    monkeypatch.setitem(SOURCES, "hapt", replace(SOURCES["hapt"], package="no-such-package==1.0"))
    states = {name: state for name, _, state in status()}
    assert "not installed" in states["hapt"]


def test_requirements_pin_packages_of_sources():
    pinned = Path(__file__).parents[3].joinpath("requirements-data.txt").read_text()
    for source in SOURCES.values():
        assert f"\n{source.package} " in pinned


def arrays():
    return {"x": np.arange(200, dtype=np.float32).reshape(50, 4), "user": np.array(["a", "bc"])}


def count_calls():
    calls = []

    def make():
        calls.append(1)
        return arrays()

    return make, calls


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


def test_cached_calls_make_once(cache):
    make, calls = count_calls()
    assert equal(cached("set", 1, "identity", make), arrays())
    assert equal(cached("set", 1, "identity", make), arrays())
    assert len(calls) == 1
    assert [p.suffix for p in cache.iterdir()] == [".npz"]


@pytest.mark.parametrize("other", [("other", 1, "identity"), ("set", 2, "identity"), ("set", 1, "other")])
def test_cached_depends_on_name_version_and_identity(cache, other):
    make, calls = count_calls()
    cached("set", 1, "identity", make)
    cached(*other, make)
    assert len(calls) == 2


@pytest.mark.parametrize("damage", [b"", b"not a zip file", None])
def test_cached_recreates_damaged_file(cache, damage):
    make, calls = count_calls()
    cached("set", 1, "identity", make)
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage is None else damage)
    assert equal(cached("set", 1, "identity", make), arrays())
    assert len(calls) == 2
    assert equal(cached("set", 1, "identity", make), arrays())
    assert len(calls) == 2


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


def test_cached_works_without_writable_directory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("FEDBN_CACHE", str(tmp_path / "file" / "cache"))
    make, calls = count_calls()
    assert equal(cached("set", 1, "identity", make), arrays())
    assert equal(cached("set", 1, "identity", make), arrays())
    assert len(calls) == 2


def test_cached_leaves_no_file_on_full_disk(cache, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(packages.np, "savez", full)
    assert equal(cached("set", 1, "identity", arrays), arrays())
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
    with pytest.raises(UserError, match=r"some\.pkl uses '\w+\.system', which array data never needs: refused"):
        unpickle(io.BytesIO(content), "some.pkl", allowed)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "numpy.load", "numpy.f2py.os.system"])
def test_unpickle_rejects_other_globals(name):
    module, _, function = name.rpartition(".")
    content = f"c{module}\n{function}\n.".encode()
    with pytest.raises(UserError, match="refused"):
        unpickle(io.BytesIO(content), "some.pkl", FRAMES)


def test_unpickle_rejects_other_codecs():
    content = b"c_codecs\nencode\n(Vabc\nVzlib\ntR."
    with pytest.raises(UserError, match="codec 'zlib'"):
        unpickle(io.BytesIO(content), "some.pkl")


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
