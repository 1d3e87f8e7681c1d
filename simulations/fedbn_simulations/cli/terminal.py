"""Output on terminals that cannot show every character."""

from __future__ import annotations

import codecs
import sys
from io import TextIOWrapper

SUBSTITUTES = str.maketrans("−–—─…×°±→↓↑✔✘†", "----.xo~>v^+x*")
"""One ASCII character for each character of the tables, so that columns stay aligned."""


def substitute(error: UnicodeError) -> tuple[str, int]:
    """Error handler of `codecs` that replaces characters that an encoding does not have.

    >>> codecs.register_error("substitute", substitute)
    >>> "−.003 ± 1 ä".encode("ascii", "substitute")
    b'-.003 ~ 1 ?'
    """
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end].translate(SUBSTITUTES)
    return characters.encode("ascii", "replace").decode(), error.end


def write_any_terminal() -> None:
    """Let standard output and error substitute characters that their encoding does not have."""
    codecs.register_error("substitute", substitute)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="substitute")
