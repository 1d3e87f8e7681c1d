"""The exception for user errors.

Its message names the mistake and the fix. Any other exception that reaches the user is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_KNOWN = 60
"""Number of known names that an error message lists."""


class UserError(ValueError):
    """An error in the user's input; the message names the mistake and the fix."""


def install_extra(extra: str) -> str:
    """The command that installs an optional extra, for error messages.

    >>> install_extra("privacy")
    "pip install 'fedbn[privacy]', or pip install -e '.[privacy]' in a clone"
    """
    return f"pip install 'fedbn[{extra}]', or pip install -e '.[{extra}]' in a clone"


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Error for an unknown name, with the most similar known name and at most `MAX_KNOWN` names.

    >>> print(unknown("strategy", "fedbm", ["fedbn", "silobn"]))
    unknown strategy 'fedbm'. Did you mean 'fedbn'? Known: fedbn, silobn
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    more = f" and {len(names) - MAX_KNOWN} more" if len(names) > MAX_KNOWN else ""
    return UserError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names[:MAX_KNOWN])}{more}")
