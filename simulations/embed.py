"""Put a comparison's table into a document, between two markers, so that no number in it is typed by hand."""

from __future__ import annotations

import re
import shutil
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
    if not document.exists():
        raise UserError(f"{document} does not exist: give a text with <!-- begin {name} --> and <!-- end {name} -->")
    text = document.read_text(encoding="utf-8")
    block = re.compile(f"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    if not block.search(text):
        raise UserError(f"{document} has no block for {name}: add <!-- begin {name} --> and <!-- end {name} -->")
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
    picture = document.parent / "docs" / f"{name}.png"
    picture.parent.mkdir(exist_ok=True)
    shutil.copy(directory / "figures" / "paired-own-aggregated.png", picture)
    document.write_text(block.sub(lambda m: m[1] + table + m[2], text), encoding="utf-8")
