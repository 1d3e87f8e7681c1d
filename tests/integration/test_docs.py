"""The documentation is consistent: lists match the command line, and links, commands and examples work."""

from __future__ import annotations

import doctest
import html
import json
import os
import re
import runpy
import subprocess
import sys
from collections import Counter

import pytest

from fedbn_simulations.claims.claim import discover_studies
from fedbn_simulations.cli.catalog import Kind, linked_rows
from fedbn_simulations.results.formatting import markdown_table
from tests.commands import commands_in, parses
from tests.helpers import ROOT, nonempty

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [d for d in DOCUMENTS if d.name != "README.md"]
LISTS = {
    (page, kind): block
    for page in ("methods.md", "data-sets.md")
    for kind, block in re.findall(
        r"<!-- begin (\w+) -->\n(.*?)<!-- end \1 -->", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL
    )
}
LINKS = {document: re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text("utf-8")) for document in DOCUMENTS}


@pytest.mark.parametrize(("page", "kind"), LISTS)
def test_method_lists_match_command(page, kind):
    assert LISTS[page, kind] == markdown_table(linked_rows(Kind(kind))), f"run: fedbn list {kind} --into docs/{page}"


@pytest.mark.parametrize("document", [d for d, targets in LINKS.items() if targets], ids=lambda path: path.name)
def test_links_to_files_exist(document):
    for target in LINKS[document]:
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize("line", dict.fromkeys(line for page in PAGES for line in commands_in(page)))
def test_document_commands_parse(line):
    parses(line)


def test_claim_figures_read_every_page():
    entry_of = runpy.run_path(str(ROOT / "docs" / "claim_figures.py"))["entry_of"]
    verdicts = Counter()
    for study, (_, claims) in discover_studies().items():
        page = ROOT / "docs" / "claims" / f"{study}.md"
        verdicts.update(entry_of(claim, page.read_text("utf-8")).verdict for claim in claims if page.exists())
    hold, not_hold, undecided = (verdicts[name] for name in ("holds", "does not hold", "undecided"))
    text = (ROOT / "docs" / "claims.md").read_text("utf-8")
    assert f"{hold} hold, {not_hold} do not, {undecided} are undecided" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_pages_are_short(page):
    """At most 2,500 words, without collapsed parts."""
    words = re.sub(r"<details.*?</details>", "", page.read_text("utf-8"), flags=re.DOTALL).split()
    assert len(words) <= 2_500


def test_table_commands_use_relative_paths():
    lines = (line for document in DOCUMENTS for line in document.read_text(encoding="utf-8").splitlines())
    for caption in nonempty(line for line in lines if "made by `fedbn" in line):
        assert "=/" not in caption
        assert " /" not in caption.partition("made by")[2]


@pytest.mark.parametrize("page", [p for p in PAGES if ">>>" in p.read_text()], ids=lambda path: path.name)
def test_document_examples_run(page):
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted
    assert not result.failed


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "fedbn.statistics.moments.Moments.merge" in page
    assert "math:" not in page
    assert "<math" in (tmp_path / "site" / "reference-methods" / "index.html").read_text()
    index = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text())
    for word in ("fedavg", "F1", "wandb", "citation", "ClientApp", "Weights & Biases"):
        assert any(re.search(rf"\b{word}\b", html.unescape(p["text"]), re.IGNORECASE) for p in index["docs"]), word
    for part in nonempty((tmp_path / "site").rglob("*.html")):
        assert not re.findall(r'(?:src|href)="https?://[^"]+\.(?:js|css|woff2?)"', part.read_text()), part
