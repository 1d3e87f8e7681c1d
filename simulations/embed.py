"""Put a comparison's table into a document, between two markers, so that no number in it is typed by hand."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from fedbn.errors import UserError
from simulations.results import Comparison
from simulations.tables import answer


def embed(directory: Path, document: Path) -> None:
    """Replace what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; NAME is the directory's name.

    The plot of paired differences is copied beside the document, into ``docs/NAME.png``.

    Raises:
        UserError: the document or its markers are missing.
    """
    name = directory.resolve().name
    replace_block(document, name)  # before anything is computed
    comparison = Comparison.load(directory)
    table = "\n".join(
        [
            answer(comparison),
            "",
            comparison.to_markdown().rstrip(),
            "",
            f"Mean accuracy over users [95 % interval over users], {len(comparison.meta['seeds'])} paired seeds; "
            f"made by `{comparison.meta['command']}`.",
            "",
        ]
    )
    # Pictures lie in docs/, beside the documents there.
    picture = (document.parent if document.parent.name == "docs" else document.parent / "docs") / f"{name}.png"
    picture.parent.mkdir(exist_ok=True)
    shutil.copy(directory / "figures" / "paired-own-aggregated.png", picture)
    replace_block(document, name, table)


def replace_block(document: Path, name: str, content: str | None = None) -> None:
    """Replace what stands between a document's two markers for ``name``; without content only look for them.

    Raises:
        UserError: the document or its markers are missing.
    """
    if not document.exists():
        raise UserError(f"{document} does not exist: give a text with <!-- begin {name} --> and <!-- end {name} -->")
    text = document.read_text(encoding="utf-8")
    block = re.compile(f"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    if not block.search(text):
        raise UserError(f"{document} has no block for {name}: add <!-- begin {name} --> and <!-- end {name} -->")
    if content is not None:
        document.write_text(block.sub(lambda m: m[1] + content + m[2], text), encoding="utf-8")


def markdown(rows: Sequence[dict[str, str]]) -> str:
    r"""Rows of one shape as a Markdown table.

    >>> print(markdown([{"name": "fedbn", "what": "a|b"}]), end="")
    | name | what |
    | --- | --- |
    | fedbn | a\|b |
    """
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[name]).replace("|", "\\|") for name in head] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
