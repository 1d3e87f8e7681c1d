"""The documentation lists the layers and functions of the stacked program."""

from __future__ import annotations

from pathlib import Path

from fedbn.stacked.supported import markdown


def test_documented_lists_match_registries():
    text = (Path(__file__).parents[3] / "docs" / "speed.md").read_text(encoding="utf-8")
    block = text.partition("<!-- begin stacked -->\n")[2].partition("<!-- end stacked -->")[0]
    assert block == markdown() + "\n", "run: python -m fedbn.stacked.supported"
