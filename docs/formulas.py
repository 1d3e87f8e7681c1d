"""MkDocs hook that renders formulas as MathML, which browsers display without scripts or external fonts."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert


def display(source: str) -> str:
    r"""A display formula: equations beside each other that wrap, and that scroll where one is wider than the page.

    Lines with ``&`` are aligned. Other formulas are split at ``\quad`` and at the ends of lines.
    """
    if "&" in source and r"\begin" not in source:
        equations = [rf"\begin{{split}}{source}\end{{split}}"]
    else:
        equations = re.split(r"\\q?quad" if r"\begin" in source else r"\\q?quad|\\\\", source)
    shown = "".join(convert(equation, display="block") for equation in equations if equation.strip())
    return f'<div class="formula">{shown}</div>'


def on_config(config: Any) -> Any:
    """Render ```` ```math ```` blocks and ``#!math`` code spans as LaTeX."""
    inline = {"name": "math", "class": "", "format": lambda source, *_: convert(source)}
    block = {"name": "math", "class": "", "format": lambda source, *_, **__: display(source)}
    config.mdx_configs.setdefault("pymdownx.inlinehilite", {})["custom_inline"] = [inline]
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [block]
    return config
