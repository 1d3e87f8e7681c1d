"""Readable names of strategies for tables, figures and sentences. Files and commands have their labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fedbn.objects import is_reference, split_options
from fedbn.personalization.base import personalizations
from fedbn.plugins import title
from fedbn.strategies.base import strategies


def readable(label: str) -> str:
    """Readable name of a strategy, with its options and its personalization method.

    An object is named by its class. The label is returned unchanged where one of its parts is not installed.

    >>> readable("global-naive"), readable("groupnorm:groups=4"), readable("fedbn+ditto:lam=0.5")
    ('FedAvg (naive BN)', 'GroupNorm, groups=4', 'FedBN + Ditto, lam=0.5')
    >>> readable("memory:MyBN-eda7c51eaf03"), readable("mine.strategies:Mine:alpha=1"), readable("third-party")
    ('MyBN', 'Mine, alpha=1', 'third-party')
    """
    known = strategies() | personalizations()
    words = []
    for part in label.split("+"):
        name, options = split_options(part)
        if name in known:
            name = title(known[name])
        elif is_reference(name):
            name = re.sub(r"-[0-9a-f]{12}$", "", re.split("[:.]", name)[-1])
        else:
            return label
        words.append(", ".join([name, *options]))
    return " + ".join(words)


def data_name(scenario: str) -> str:
    """Name of the data in titles: that of the file for a user's own data, else the scenario as in commands.

    >>> data_name("hapt:unseen=10"), data_name("files:path=/home/ann/mine.csv:y=activity")
    ('hapt:unseen=10', 'mine.csv')
    """
    name, options = split_options(scenario)
    paths = [option.removeprefix("path=") for option in options if option.startswith("path=")]
    return Path(paths[0]).name if name == "files" and paths else scenario


def distinct_names(labels: Iterable[str]) -> dict[str, str]:
    """Readable name by label. Objects with the same name have the first characters of their digests, or their labels.

    >>> list(distinct_names(["fedbn", "memory:MyBN-eda7c51eaf03", "memory:MyBN-0b11c51eaf03"]).values())
    ['FedBN', 'MyBN (eda7)', 'MyBN (0b11)']
    >>> list(distinct_names(["mine:BN", "yours:BN"]).values())
    ['mine:BN', 'yours:BN']
    """
    names = {label: readable(label) for label in labels}
    counts = Counter(names.values())
    return {label: name if counts[name] == 1 else _with_digest(label, name) for label, name in names.items()}


def _with_digest(label: str, name: str) -> str:
    digests = re.findall(r"-([0-9a-f]{4})[0-9a-f]{8}\b", label)
    return f"{name} ({', '.join(digests)})" if digests else label
