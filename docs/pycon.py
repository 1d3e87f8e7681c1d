"""Show the doctests of docstrings as code, and their formulas as formulas, when the site is built."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^>>> .*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)
"""From a prompt to the next empty line."""

DISPLAY = re.compile(r"^\.\. math::((?:.*)(?:\n(?:[ \t]+\S.*)?)*)", re.MULTILINE)
"""A formula of its own: what follows on the line, and all lines further in."""

INLINE = re.compile(r":math:`")


class Doctests(Extension):
    """Fence what Markdown would take for quotations (prompts) or for text (formulas, see `formulas.py`)."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """A docstring with its prompts and formulas fenced."""
    text = EXAMPLE.sub(lambda block: f"```pycon\n{block[0]}\n```", text)
    text = DISPLAY.sub(lambda block: f"```math\n{dedent(block[1]).strip()}\n```\n\n", text)
    return INLINE.sub("`#!math ", text)
