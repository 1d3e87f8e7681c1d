"""Wheel builds are reproducible and complete, and the oldest allowed versions are pinned."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

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
    assert oldest.pop("torch") == newest["torch"], "torch and matplotlib are exceptions, as explained in the file"
    assert oldest.pop("matplotlib") == "3.11"
    del lower["torch"], lower["matplotlib"]
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


@pytest.mark.slow
def test_wheel_installs_three_packages_and_the_command(tmp_path):
    """Into an empty environment, with the dependencies of this one."""
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" not in name}
    assert top == {"fedbn", "fedbn_clients", "fedbn_simulations"}
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(install, env=variables, check=True, capture_output=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # without its editable installations

    def output(*command):
        done = subprocess.run(command, cwd=tmp_path, env=variables, check=True, capture_output=True, text=True)
        return done.stdout

    assert "Run any Flower app" in output(environment / "bin" / "fedbn", "--help")
    files = output(python, "-c", "import fedbn; print(fedbn.__file__, fedbn.run_simulation.__code__.co_filename)")
    assert files.count(str(packages)) == 2
