from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest

from fedbn_simulations.cli.app import user_message
from fedbn_simulations.cli.terminal import SUBSTITUTES
from tests.helpers import PYTHONPATH, ROOT

COMPARE = (
    "-m",
    "fedbn",
    "compare",
    "digits8:images=300",
    "--strategies",
    "fedbn,silobn",
    "--rounds",
    "1",
    "--seeds",
    "2",
)


def run(*command, **options):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": PYTHONPATH, "LC_ALL": "C", "COLUMNS": "80"}
    environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run((sys.executable, *command), env=environment, capture_output=True, timeout=300, **options)


@pytest.mark.slow
def test_tables_print_on_an_ascii_terminal(tmp_path):
    done = run(*COMPARE, "--workers", "1", "--out", str(tmp_path / "out"))
    text = done.stdout.decode("ascii")
    assert done.returncode == 0, done.stderr
    assert re.search(r"FedBN +\|\.\d{3} ", text)
    assert max(len(line) for line in text.splitlines() if "|" in line) <= 80


def test_every_character_of_the_source_has_a_substitute():
    files = [p for package in ("fedbn", "simulations") for p in (ROOT / package).rglob("*.py")]
    symbols = {c for p in files for c in p.read_text(encoding="utf-8") if ord(c) > 127 and not c.isalpha()}
    assert len(symbols) > 5
    assert {c for c in symbols if ord(c) not in SUBSTITUTES} == set()


@pytest.mark.slow
def test_a_memory_limit_is_reported_in_one_sentence(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (1_200_000 * 1024,) * 2)

    done = run(*COMPARE, "--workers", "2", "--out", str(tmp_path / "out"), preexec_fn=limit)
    if done.returncode == 0:
        pytest.skip("this machine needs less memory")
    error = " ".join(done.stderr.decode().split())
    assert "Traceback" not in error
    assert re.search("error: (not enough memory|a worker process was killed)", error)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "not enough memory: use fewer --workers"),
        (OSError(errno.ENOMEM, "x"), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (ImportError("libx.so: failed to map segment from shared object"), "not enough memory"),
        (RuntimeError("can't start new thread"), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
        (BrokenProcessPool("terminated abruptly"), "a worker process was killed, probably for lack of memory"),
        (OSError(errno.ENOSPC, "x", "out/a"), "No space left on device (out/a): free disk space"),
        (OSError(errno.EROFS, "x"), "Read-only file system: free disk space"),
    ],
)
def test_user_message_names_what_is_missing(error, message):
    assert user_message(error).startswith(message)


def test_user_message_does_not_hide_bugs():
    assert user_message(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert user_message(FileNotFoundError(2, "No such file", "a")) is None
