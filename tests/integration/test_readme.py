"""The README is true: its Python runs, its commands exist, its files are there."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from fedbn.errors import UserError
from simulations.experiments.experiment import Experiment
from simulations.report.documents import update_document
from tests.commands import commands_in, parses

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_examples_run():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted > 8
    assert result.failed == 0


@pytest.mark.parametrize("line", commands_in(ROOT / "README.md"))
def test_commands_parse(line):
    parses(line)


def test_the_run_file_is_valid(tmp_path):
    import tomllib

    (text,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    experiment = Experiment.from_dict(tomllib.loads(text)).resolved()
    assert experiment.plan.clients_per_round == 8


def test_files_it_names_exist():
    for path in [*re.findall(r"!\[.*?\]\((.*?)\)", README), "requirements-data.txt", "LICENSE", "Makefile"]:
        assert (ROOT / path).exists(), path


def test_make_offers_what_it_says():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(f"^{target}:", makefile, re.MULTILINE)


def test_embedding_needs_its_markers(tmp_path):
    with pytest.raises(UserError, match="does not exist: give a text with <!-- begin x -->"):
        update_document(tmp_path / "x", tmp_path / "none.md")
    (tmp_path / "a.md").write_text("nothing")
    with pytest.raises(UserError, match="has no block for x: add <!-- begin x -->"):
        update_document(tmp_path / "x", tmp_path / "a.md")
