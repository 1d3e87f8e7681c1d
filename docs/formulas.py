"""Typeset formulas when the site is built, as MathML: browsers draw it without a script or a font from the network."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Let ```` ```math ```` and ``#!math`` in code spans mean LaTeX."""
    inline = {"name": "math", "class": "", "format": lambda source, *_: convert(source)}
    block = {"name": "math", "class": "", "format": lambda source, *_, **__: convert(source, display="block")}
    config.mdx_configs.setdefault("pymdownx.inlinehilite", {})["custom_inline"] = [inline]
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [block]
    return config
