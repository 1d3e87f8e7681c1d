"""``fedbn new strategy`` makes a package that builds, is found by its entry point and passes its own tests."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fedbn.errors import UserError
from fedbn_simulations.cli.new import new_strategy
from tests.helpers import PYTHONPATH, nonempty


@pytest.mark.slow
def test_new_package_builds_and_passes_its_tests(tmp_path):
    pytest.importorskip("hatchling")
    place = new_strategy("my-norm", tmp_path / "made")
    build = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*build, "--target", tmp_path / "site", place], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    env = os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{PYTHONPATH}"}

    def run(*command):
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=tmp_path)

    listed = run("-m", "fedbn", "list", "strategies", "--json")
    assert '"my-norm"' in listed.stdout, listed.stderr
    tested = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--doctest-modules", place)
    assert tested.returncode == 0, tested.stdout
    assert "3 passed" in tested.stdout
    audited = run("-m", "fedbn", "audit", "resnet20", "--strategy", "my-norm", "--json")
    assert '"strategy": "my-norm"' in audited.stdout, audited.stderr


def test_new_package_passes_ruff(tmp_path):
    place = new_strategy("a2-norm", tmp_path / "made")
    assert {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()} == {
        "README.md",
        "pyproject.toml",
        "fedbn_a2_norm/__init__.py",
        "tests/test_fedbn_a2_norm.py",
    }
    for path in nonempty(place.rglob("*.py")):
        compile(path.read_text(), path, "exec")
        assert "{{" not in path.read_text()
    assert "class A2Norm(NormStrategy)" in (place / "fedbn_a2_norm" / "__init__.py").read_text()


@pytest.mark.parametrize("name", ["My", "2norm", "a--b", "a_b", "a-", "", "a/b", "a\n"])
def test_new_rejects_bad_names(name, tmp_path):
    with pytest.raises(UserError, match="is not a valid strategy name"):
        new_strategy(name, tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_new_rejects_taken_names_and_directories(tmp_path):
    with pytest.raises(UserError, match="strategy 'fedbn' already exists"):
        new_strategy("fedbn", tmp_path / "made")
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="already exists: choose another --out"):
            new_strategy("my-norm", place)
    with pytest.raises(UserError, match="cannot write"):
        new_strategy("my-norm", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"
