"""Run tests on a copy of the source tree, each file in a fork of a process that has imported third-party modules."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mutation.selection import SOURCES

OURS = ("fedbn", "fedbn_clients", "fedbn_simulations", "tests", "benchmarks")
"""Packages of the source tree."""

PYTEST = ["-n0", "-q", "--tb=short", "-p", "no:cacheprovider"]

MEMORY = 12 * 2**30
"""Address space of a process in bytes: a mutant may allocate without end."""


def copy_tree(root, target):
    """Copy the files of a working tree that Git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def fork(function, timeout, log=os.devnull):
    """Exit code of a function that is called in a fork, or None after a timeout."""
    child = os.fork()
    if not child:
        code = 70
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = int(function())
        finally:
            os._exit(code)
    end = time.monotonic() + timeout
    status = None
    while status is None and time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        status = status if pid else None
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


class Runner:
    """Runs test files of a copied tree.

    Args:
        root: Working tree to copy.
        work: Empty directory for the copy and temporary files.
        marks: Expression for pytest's option ``-m``.
    """

    def __init__(self, root, work, marks):
        self.tree, self.work, self.marks = work / "tree", work, marks
        self.baseline = {}
        copy_tree(root, self.tree)
        self.import_third_party()

    def enter(self):
        """Let a forked process import the copy."""
        for name in [n for n in sys.modules if n.partition(".")[0] in OURS]:
            del sys.modules[name]
        ours = [str(self.tree / directory) for directory in SOURCES]
        originals = [Path.cwd() / directory for directory in SOURCES]
        sys.path[:] = [*ours, *(p for p in sys.path if Path(p or ".").resolve() not in originals)]
        os.environ["PYTHONPATH"] = os.pathsep.join(ours)
        # A mutant must neither read nor write the cache of the user.
        os.environ["FEDBN_CACHE"] = str(self.work / "cache")
        os.chdir(self.tree)
        importlib.invalidate_caches()

    def import_third_party(self):
        """Import what the tests import, except modules of the source tree."""
        names = self.work / "modules.txt"

        def collect():
            self.enter()
            code = pytest.main(["--collect-only", *PYTEST, "tests"])
            names.write_text("\n".join(n for n in sys.modules if n.partition(".")[0] not in OURS), encoding="utf-8")
            return code

        if fork(collect, 600, self.work / "log.txt") != 0:
            raise SystemExit((self.work / "log.txt").read_text(encoding="utf-8", errors="replace"))
        for name in names.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        gc.freeze()

    def test(self, path, timeout):
        """Exit code of pytest for one file, or None after a timeout."""

        def run():
            self.enter()
            return pytest.main([*PYTEST, "-x", "-m", self.marks, f"--basetemp={self.work / 'tmp'}", path])

        return fork(run, timeout, self.work / "log.txt")

    def passing(self, path):
        """Seconds that a file takes without a mutant, or None if it has no test or fails."""
        if path not in self.baseline:
            start = time.monotonic()
            code = self.test(path, 900)
            self.baseline[path] = time.monotonic() - start if code == 0 else None
            if code not in (0, 5):
                print(f"{path} fails without a mutant (exit code {code})", file=sys.stderr)
                print((self.work / "log.txt").read_text(encoding="utf-8", errors="replace")[-2000:], file=sys.stderr)
        return self.baseline[path]

    @contextlib.contextmanager
    def mutated(self, mutant):
        """The copy with a mutant."""
        path = self.tree / mutant.module
        compiled = Path(importlib.util.cache_from_source(str(path)))
        code = path.read_text(encoding="utf-8")
        try:
            compiled.unlink(missing_ok=True)
            shutil.rmtree(self.work / "cache", ignore_errors=True)
            path.write_text(mutant.source(code), encoding="utf-8")
            yield
        finally:
            path.write_text(code, encoding="utf-8")
            compiled.unlink(missing_ok=True)
            shutil.rmtree(self.work / "cache", ignore_errors=True)

    def outcome(self, mutant, tests):
        """``killed``, ``timeout``, ``survived`` or ``untested``, and the file that decided it."""
        tested = False
        for path in tests:
            if self.passing(path) is None:
                continue
            tested = True
            with self.mutated(mutant):
                code = self.test(path, 30 + 5 * self.baseline[path])
            if code != 0:
                return ("timeout" if code is None else "killed"), path
        return ("survived" if tested else "untested"), ""
