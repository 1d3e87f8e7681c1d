"""The README is correct: its examples run, and its commands and files exist."""

from __future__ import annotations

import doctest
import re

import pytest

from fedbn.errors import UserError
from simulations.experiments.experiment import Experiment
from simulations.report.documents import update_document
from tests.commands import commands_in, parses
from tests.helpers import ROOT, nonempty

README = (ROOT / "README.md").read_text(encoding="utf-8")
CLI_PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def test_readme_examples_run():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted > 8
    assert result.failed == 0


@pytest.mark.parametrize("line", commands_in(ROOT / "README.md"))
def test_readme_commands_parse(line):
    parses(line)


def test_readme_run_file_is_valid(tmp_path):
    import tomllib

    (text,) = re.findall(r"```toml\n(.*?)```", CLI_PAGE, re.DOTALL)
    experiment = Experiment.from_dict(tomllib.loads(text)).resolved()
    assert experiment.plan.clients_per_round == 8


def test_readme_files_exist():
    for path in [*nonempty(re.findall(r"!\[.*?\]\((.*?)\)", README)), "requirements-data.txt", "LICENSE", "Makefile"]:
        assert (ROOT / path).exists(), path


def test_readme_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in nonempty(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(f"^{target}:", makefile, re.MULTILINE)


def test_update_document_requires_markers(tmp_path):
    with pytest.raises(UserError, match="does not exist: give a file with <!-- begin x -->"):
        update_document(tmp_path / "x", tmp_path / "none.md")
    (tmp_path / "a.md").write_text("nothing")
    with pytest.raises(UserError, match="has no block for x: add <!-- begin x -->"):
        update_document(tmp_path / "x", tmp_path / "a.md")
