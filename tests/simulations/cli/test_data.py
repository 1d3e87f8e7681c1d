"""The command ``fedbn data`` and notices about the user's data."""

from __future__ import annotations

import json

import pytest

ROWS = [f"{i},{i % 5},{i % 3 + 1},{'abcd'[i // 12]}" for i in range(48)]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "own.csv").write_text("\n".join(["x0,x1,y,user", *ROWS]))
    return tmp_path / "own.csv"


def test_data_shows_users_classes_and_notices(run_cli, path):
    code, output, _ = run_cli("data", "--data", str(path))
    assert code == 0
    assert "examples of shape [2]" in output
    assert "own.csv: labels 1, 2, 3 are classes 0, 1, 2" in output.replace("\n", " ")
    users = [line.split()[:2] for line in output.splitlines() if line[:2] in ("a ", "b ", "c ", "d ")]
    assert users == [["a", "yes"], ["b", "no"], ["c", "yes"], ["d", "yes"]]


def test_data_prints_json(run_cli, path):
    found = json.loads(run_cli("data", "--data", str(path), "--json")[1])
    assert found["shape"] == [2]
    assert [c["label"] for c in found["classes"]] == ["1", "2", "3"]
    assert sum(c["training rows"] for c in found["classes"]) == sum(u["training rows"] for u in found["users"]) == 32
    assert [u["trains"] for u in found["users"]] == ["yes", "no", "yes", "yes"]
    assert found["notices"] == ["own.csv: labels 1, 2, 3 are classes 0, 1, 2"]


def test_comparison_stores_classes_and_notices(run_cli, path, tmp_path):
    options = ["--strategies", "fedbn", "--rounds", "1", "--seeds", "2", "--batch-size", "4", "--workers", "1"]
    code, output, errors = run_cli("compare", "--data", str(path), *options, "--out", str(tmp_path / "out"))
    assert code == 0, errors
    stored = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert stored["classes"] == ["1", "2", "3"]
    assert stored["notices"] == ["own.csv: labels 1, 2, 3 are classes 0, 1, 2"]
    assert output.replace("\n", " ").count("labels 1, 2, 3 are classes 0, 1, 2") == 1
    assert "Classes by index: 1, 2, 3." in (tmp_path / "out" / "report.html").read_text()


def test_paths_with_colons_are_read(run_cli, path):
    other = path.with_name("a:b.csv")
    path.rename(other)
    assert run_cli("data", "--data", str(other))[0] == 0
