"""Readable names of strategies for tables."""

from __future__ import annotations

from fedbn.personalization.base import personalizations
from fedbn.plugins import title
from fedbn.strategies.base import strategies


def readable(label: str) -> str:
    """Readable name of a strategy, with its options and its personalization method.

    The label is returned unchanged where one of its parts is not installed.

    >>> readable("global-naive"), readable("groupnorm:groups=4"), readable("fedbn+ditto:lam=0.5")
    ('FedAvg (naive BN)', 'GroupNorm, groups=4', 'FedBN + Ditto, lam=0.5')
    >>> readable("third-party")
    'third-party'
    """
    known = strategies() | personalizations()
    words = []
    for part in label.split("+"):
        name, *options = part.split(":")
        if name not in known:
            return label
        words.append(", ".join([title(known[name]), *options]))
    return " + ".join(words)
