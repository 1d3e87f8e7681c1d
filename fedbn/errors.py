"""The one exception for mistakes a user can make and mend.

Its text always names the mistake and the fix. Everything else that escapes is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user asked for; the message says what to do instead."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest one that does.

    >>> print(unknown("strategy", "fedbm", ["fedbn", "silobn"]))
    unknown strategy 'fedbm'. Did you mean 'fedbn'? Known: fedbn, silobn
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}")
