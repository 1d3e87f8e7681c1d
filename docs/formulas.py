"""MkDocs hook that renders formulas as MathML, which browsers display without scripts or external fonts."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def scrolled(formula: str) -> str:
    """A formula that scrolls where it is wider than the page."""
    return f'<div class="formula">{formula}</div>'


def on_config(config: Any) -> Any:
    """Render ```` ```math ```` blocks and ``#!math`` code spans as LaTeX."""
    inline = {"name": "math", "class": "", "format": lambda source, *_: convert(source)}
    block = {"name": "math", "class": "", "format": lambda source, *_, **__: scrolled(convert(source, display="block"))}
    config.mdx_configs.setdefault("pymdownx.inlinehilite", {})["custom_inline"] = [inline]
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [block]
    return config
