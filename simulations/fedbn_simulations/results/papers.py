"""Papers and short descriptions of plug-ins."""

from __future__ import annotations

import re
import sys

ARXIV = "arXiv:"


def link_of(part: type) -> str:
    """The first link in the class's source or docstring, or in the docstring of its module; empty if there is none."""
    texts = (getattr(part, "source", ""), part.__doc__, sys.modules[part.__module__].__doc__)
    for text in filter(None, texts):
        if found := re.search(r"https?://[^\s)`>]+", text):
            return found[0].rstrip(".,;")
        if found := re.search(rf"{ARXIV}([\d.]+\d)", text):
            return f"https://arxiv.org/abs/{found[1]}"
    return ""


def without_options(about: str) -> str:
    """A one-line description without its list of options.

    >>> without_options("GroupNorm instead of BN; options groups or channels (per group)")
    'GroupNorm instead of BN'
    """
    return re.sub(r"; options? .*", "", about)


def without_link(source: str) -> str:
    """Authors and year of a plug-in's source.

    >>> without_link("Li et al. 2021, https://arxiv.org/abs/2102.07623")
    'Li et al. 2021'
    """
    return source.partition(ARXIV)[0].partition("https://")[0].rstrip(", ")


def paper(part: type) -> str:
    """Authors and year as a Markdown link, or without a link where none is known."""
    source, link = without_link(getattr(part, "source", "")), link_of(part)
    return f"[{source or 'paper'}]({link})" if link else source
