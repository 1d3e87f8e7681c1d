"""Griffe extension that renders doctests of docstrings as code blocks, and their formulas as math."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^>>> .*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)
"""An example: from a prompt to the next empty line."""

DISPLAY = re.compile(r"^\.\. math::((?:.*)(?:\n(?:[ \t]+\S.*)?)*)", re.MULTILINE)
"""A display formula: the rest of the line and all indented lines."""

INLINE = re.compile(r":math:`")


class Doctests(Extension):
    """Fences prompts and formulas, which Markdown would render as quotations and text (see `formulas.py`)."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The docstring with fenced prompts and formulas."""
    text = EXAMPLE.sub(lambda block: f"```pycon\n{block[0]}\n```", text)
    text = DISPLAY.sub(lambda block: f"```math\n{dedent(block[1]).strip()}\n```\n\n", text)
    return INLINE.sub("`#!math ", text)
