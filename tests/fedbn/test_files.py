from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbn.errors import UserError
from fedbn.files import LOCK, locked, read_json, with_checksum, without_checksum, write_atomically, write_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "crc32"), VALUES, max_size=4))
def test_checksum_survives_a_round_trip_through_text(value):
    assert without_checksum(json.loads(json.dumps(with_checksum(value)))) == value
    assert with_checksum(with_checksum(value)) == with_checksum(value)


@pytest.mark.parametrize("value", [[], None, 1, {}, {"a": 1}, {"a": 1, "crc32": "00000000"}])
def test_checksum_is_required(value):
    with pytest.raises(ValueError, match="checksum"):
        without_checksum(value)


def test_read_json_detects_every_changed_value(tmp_path):
    path = tmp_path / "result.json"
    value = {"accuracy": [0.8125, 1.0, -3e-7], "user": "Ann", "n": 12, "nothing": None}
    write_json(path, value)
    content, accepted, messages = path.read_bytes(), 0, set()
    assert read_json(path) == value
    for position in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
            try:
                assert read_json(path) == value
                accepted += 1
            except UserError as error:
                messages.add(str(error))
    assert all(m.startswith(f"{path} is damaged (") and "\n" not in m for m in messages)
    assert accepted < 0.1 * 8 * len(content)  # changes of spaces between values
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is damaged .*: copy it"):
        read_json(path, "copy it")
    path.unlink()
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\): delete it and run"):
        read_json(path)


def test_write_json_refuses_values_that_are_not_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a", {"loss": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_write_atomically_reports_a_full_disk_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*file: No space left on device; choose another --out"):
        write_atomically(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


HOLD = """
import sys, pathlib, fedbn.files
with fedbn.files.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


def test_lock_refuses_a_second_process_and_ends_with_its_owner(tmp_path):
    directory = tmp_path / "out"
    command = (sys.executable, "-c", HOLD, str(directory))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"another process writes to .*out: wait until it ends"), locked(directory):
            pass
        assert (directory / LOCK).exists()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    with locked(directory):
        assert (directory / LOCK).exists()
    assert list(directory.iterdir()) == []


def test_lock_reports_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to .*; choose another --out"), locked(tmp_path / "file" / "out"):
        pass
