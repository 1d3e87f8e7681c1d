"""The documents say what is there: lists as the command line gives them, links that lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from simulations.cli import Kind, _rows
from simulations.embed import markdown

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", re.findall(r"<!-- begin (\w+) -->", METHODS))
def test_lists_are_as_the_command_gives_them(kind):
    block = re.search(f"<!-- begin {kind} -->\n(.*?)<!-- end {kind} -->", METHODS, re.DOTALL)[1]
    assert block == markdown(_rows(Kind(kind))), f"run: fedbn list {kind} --into docs/methods.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
