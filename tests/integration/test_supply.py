"""The wheel is the same bytes whenever it is built; the oldest versions allowed are pinned once and for all."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def lines(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_oldest_versions_tested_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lower = {}
    for text in project["dependencies"]:
        need = Requirement(text)
        lower[need.name] = next(s.version for s in need.specifier if s.operator == ">=")
    oldest = {r.name: next(iter(r.specifier)).version for r in lines("constraints-oldest.txt")}
    newest = {r.name: next(iter(r.specifier)).version for r in lines("constraints.txt")}
    assert oldest.pop("torch") == newest["torch"], "the only one that is not the lower bound; the file says why"
    del lower["torch"]
    assert {k: oldest.get(k) for k in lower} == lower


@pytest.mark.slow
def test_a_wheel_built_twice_is_the_same_bytes(tmp_path):
    digests = set()
    for number in (1, 2):
        out = tmp_path / str(number)
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
            cwd=ROOT,
            env=environment,
            check=True,
            capture_output=True,
        )
        (wheel,) = out.glob("*.whl")
        digests.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert len(digests) == 1
