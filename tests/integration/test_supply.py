"""Wheel builds are reproducible, and the oldest allowed versions are pinned."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.helpers import ROOT


def requirements_in(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


def test_oldest_constraints_match_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lower = {}
    for text in project["dependencies"]:
        requirement = Requirement(text)
        lower[requirement.name] = next(s.version for s in requirement.specifier if s.operator == ">=")
    oldest = {r.name: next(iter(r.specifier)).version for r in requirements_in("constraints-oldest.txt")}
    newest = {r.name: next(iter(r.specifier)).version for r in requirements_in("constraints.txt")}
    assert oldest.pop("torch") == newest["torch"], "the only exception to the lower bounds, as explained in the file"
    del lower["torch"]
    assert {k: oldest.get(k) for k in lower} == lower


@pytest.mark.slow
def test_wheel_build_is_reproducible(tmp_path):
    digests = set()
    for number in (1, 2):
        out = tmp_path / str(number)
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        (wheel,) = out.glob("*.whl")
        digests.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert len(digests) == 1
