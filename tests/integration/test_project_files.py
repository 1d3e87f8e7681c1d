"""Workflows, templates and hooks of the repository are valid and agree with the project."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

from tests.helpers import ROOT, nonempty

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_is_complete(path):
    workflow = read(path)
    assert workflow[True], "YAML reads the key `on` as true"
    assert workflow["permissions"]["contents"] == "read"
    for job in nonempty(workflow["jobs"].values()):
        assert job["timeout-minutes"]
        for step in nonempty(job["steps"]):
            assert ("uses" in step) != ("run" in step)
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./]+", step["uses"])
            elif step["run"].startswith("make "):
                assert re.search(rf"^{step['run'].split()[1]}:", MAKEFILE, re.MULTILINE), step["run"]


def test_tests_workflow_covers_supported_versions_of_python():
    versions = read(ROOT / ".github/workflows/tests.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    lowest = tomllib.loads(PYPROJECT)["project"]["requires-python"].removeprefix(">=")
    assert versions == [lowest, "3.12", "3.13"]


def test_release_workflow_has_no_token():
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    assert "secrets" not in text
    publish = yaml.safe_load(text)["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert re.search('^version = "', PYPROJECT, re.MULTILINE), "the workflow compares this line with the tag"


def test_issue_forms_name_their_fields():
    for path in nonempty(p for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml"):
        form = read(path)
        assert form["name"]
        assert form["description"]
        names = [field["id"] for field in nonempty(form["body"])]
        assert len(set(names)) == len(names)
        assert all(field["attributes"]["label"] for field in form["body"])


def test_hooks_are_tools_of_lint():
    lint = MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0]
    (repo,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    for hook in nonempty(repo["hooks"]):
        assert f"$(BIN)/{hook['entry'].removeprefix('.venv/bin/').removesuffix(' --fix')}" in lint


def test_links_of_project_files_exist():
    for name in ("CONTRIBUTING.md", "CODE_OF_CONDUCT.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in nonempty(re.findall(r"\]\(([^)]+)\)", text)):
            assert target.startswith("https://") or (ROOT / target).exists(), target


def test_lower_bounds_have_reasons():
    lines = PYPROJECT.partition("dependencies = [\n")[2].partition("\n]")[0].splitlines()
    assert all(re.search(r'",  # \w', line) for line in nonempty(lines))
