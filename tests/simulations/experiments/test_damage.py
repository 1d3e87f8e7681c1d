"""Damaged files of a comparison are reported in one sentence or computed again; no number of a report changes."""

from __future__ import annotations

import shutil

import pytest

from fedbn.errors import UserError
from fedbn.federation.run import plan_for
from fedbn.files import read_json
from fedbn_simulations.experiments.compare import compare, resume
from fedbn_simulations.experiments.experiment import Experiment
from fedbn_simulations.experiments.tasks import CHECKPOINT
from fedbn_simulations.report.page import write_report
from fedbn_simulations.results.comparison import Comparison
from tests.helpers import mostly_slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    plan = plan_for("digits8:images=600", rounds=2, global_test=60, eval_every=2)
    return compare(Experiment("digits8:images=600", ("fedbn", "silobn"), plan=plan, seeds=1), directory, workers=1)


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def run_file(directory, name):
    (path,) = directory.glob(f"runs/fedbn-*/{name}")
    return path


def flipped(path, positions):
    """Write the file with one changed bit at each of some positions, one after the other."""
    content = path.read_bytes()
    for position in range(3, len(content), max(1, len(content) // positions)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 2]) + content[position + 1 :])
        yield
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["comparison.json", "shift.json", "result.json"])
def test_report_has_no_changed_number(finished, copy, name):
    path = run_file(copy, name) if name == "result.json" else copy / name
    expected, messages = Comparison.load(finished), []
    remedy = "delete it and run the same comparison" if name == "comparison.json" else f"`fedbn resume {copy}` computes"
    for _ in flipped(path, 60):
        try:
            found = Comparison.load(copy)
        except UserError as error:
            messages.append(str(error))
        else:  # a space between two values
            assert found.evaluations.equals(expected.evaluations)
            assert (found.meta, found.shift) == (expected.meta, expected.shift)
    assert len(messages) > 40
    assert all(f"{name} is damaged" in message and remedy in message for message in messages)


@pytest.mark.parametrize("name", ["result.json", CHECKPOINT])
@pytest.mark.parametrize("damage", mostly_slow(["flip", "cut", "empty", "missing"], "flip"))
def test_resume_computes_a_damaged_file_of_a_finished_run_again(finished, copy, name, damage):
    path = run_file(copy, name)
    content = path.read_bytes()
    half = len(content) // 2
    changes = {"flip": content[:half] + bytes([content[half] ^ 4]) + content[half + 1 :], "cut": content[:half]}
    path.unlink() if damage == "missing" else path.write_bytes(changes.get(damage, b""))
    untouched = (p for p in copy.glob("runs/silobn-*/result.json"))
    before = {p: p.stat().st_mtime_ns for p in untouched}
    resume(copy, workers=1)
    again, expected = (
        read_json(run_file(d, "result.json")) | {"seconds": 0, "cpu_seconds": 0, "phases": {}} for d in (copy, finished)
    )
    assert again == expected
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert path.exists()


def test_report_on_a_full_disk_leaves_results(copy, monkeypatch):
    before = {p: p.read_bytes() for p in copy.rglob("*.json")}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedbn.files.replace_file", full)
    with pytest.raises(UserError, match="cannot write .*: No space left on device; choose another --out or free"):
        write_report(Comparison.load(copy))
    assert before == {p: p.read_bytes() for p in copy.rglob("*.json")}
