"""Protocols: the settings of a published benchmark, as far as they are known, with its source and numbers.

A protocol sets scenario, partition, model and plan of a comparison. Options that are given explicitly win, and the
report says that the comparison deviates. ``published`` has only numbers that were read in the source itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from fedbn.plugins import discover, parse, render


@dataclass(frozen=True)
class Published:
    """One published number.

    Attributes:
        strategy: the method, by its name in this package.
        value: what was measured, as the source gives it.
        where: table or figure of the source.
    """

    strategy: str
    value: str
    where: str


@dataclass(frozen=True)
class Protocol(ABC):
    """Base class of protocols; fields are options. Subclasses are in ``fedbn.protocols``, one per module.

    Attributes:
        name: name on the command line.
        about: one-line description.
        source: authors, year and link, and the files that were read.
        differs: how a comparison with these settings differs from the source, one sentence each.
        published: numbers of the source.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str]
    differs: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[tuple[Published, ...]] = ()

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Options of a comparison by name, such as ``{"scenario": "cifar", "rounds": 100}``."""


def protocols() -> dict[str, type[Protocol]]:
    """All discovered protocols, by name."""
    return discover("fedbn.protocols", Protocol)


def protocol(text: str) -> Protocol:
    """Parse a protocol such as ``pfllib-dir:join=0.1``.

    Raises:
        UserError: an unknown name or option.

    >>> protocol("pfllib-dir").settings["partition"]
    'dirichlet:alpha=0.1:clients=20:least=2'
    """
    return parse(text, "protocol", protocols())


def with_path(scenario: str, path: str) -> str:
    """A scenario with its option ``path``, if there is one.

    >>> with_path("cifar:unseen=0", "/data"), with_path("cifar", "")
    ('cifar:unseen=0:path=/data', 'cifar')
    """
    return f"{scenario}:path={path}" if path else scenario


def protocol_text(text: str) -> str:
    """The shortest form of a protocol's text; empty for none.

    >>> protocol_text("pfllib-dir:join=1.0")
    'pfllib-dir'
    """
    return render(protocol(text)) if text else ""
