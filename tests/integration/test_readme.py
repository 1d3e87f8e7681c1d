"""The README is correct: its examples run, and its commands and files exist."""

from __future__ import annotations

import doctest
import re

import pytest

from fedbn.errors import UserError
from fedbn_simulations.experiments.experiment import Experiment
from fedbn_simulations.report.documents import MAX_BRIEF, update_document
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.formatting import format_number
from fedbn_simulations.results.labels import readable
from tests.commands import commands_in, parses
from tests.helpers import ROOT, nonempty
from tests.simulations.results.test_comparison import write

README = (ROOT / "README.md").read_text(encoding="utf-8")
CLI_PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def test_readme_examples_run():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 7
    assert result.failed == 0


@pytest.mark.parametrize("line", commands_in(ROOT / "README.md"))
def test_readme_commands_parse(line):
    parses(line)


def test_readme_is_short():
    assert len(README.split()) <= 700


def table_of(name, text):
    block = re.search(f"<!-- begin {name} -->\n(.*?)<!-- end {name} -->", text, re.DOTALL)[1]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in block.splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_readme_table_equals_the_main_table():
    main = {
        (line["statistics"], readable(line["strategy"])): {k: v.split(" ")[0] for k, v in line.items()}
        for line in table_of("hapt", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    }
    rows = nonempty(table_of("hapt", README))
    assert len(rows) == MAX_BRIEF
    for row in rows:
        whole = main["as aggregated", row["strategy"]]
        assert row == {
            "strategy": row["strategy"],
            **{title: whole[title] for title in ("own test", "worst 10 %", "unseen users")},
            "unseen users, recalibrated": main.get(("recalibrated", row["strategy"]), {}).get("unseen users", "–"),
        }


def test_update_document_writes_a_brief_table(tmp_path):
    write(tmp_path / "hapt", {"global-naive": 0.8, "groupnorm:groups=4": 0.82, "centralized": 0.9})
    (tmp_path / "a.md").write_text("<!-- begin hapt -->\n<!-- end hapt -->\n")
    update_document(tmp_path / "hapt", tmp_path / "a.md", brief=True)
    rows = table_of("hapt", (tmp_path / "a.md").read_text(encoding="utf-8"))
    means = Comparison.load(tmp_path / "hapt").matrix().set_index(["strategy", "row", "column"])["mean"]
    assert [row["strategy"] for row in rows] == ["FedAvg (naive BN)", "GroupNorm, groups=4"]
    assert rows[0]["unseen users, recalibrated"] == format_number(means["global-naive", "unseen", "recalibrated"])
    assert list(rows[0])[1:] == ["own test", "worst 10 %", "unseen users", "unseen users, recalibrated"]


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
