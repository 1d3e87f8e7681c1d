"""Papers, what they publish, and the claims and comparisons that test them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from fedbn.errors import unknown


@dataclass(frozen=True)
class Paper:
    """A paper.

    Attributes:
        name: name on the command line.
        source: authors, title, year and link.
        runs: what tests it: ``claims`` with names of claims or studies, and ``compare`` with a protocol and strategies.
        published: numbers that were read in the source itself, each with its place. Numbers that are only known from
            memory or from other sources are left out.
        ours: our number, with its page, if there is one besides the claims.
        differs: why our numbers cannot be compared with the published ones; empty if they can.
    """

    name: str
    source: str
    runs: tuple[str, ...]
    published: tuple[str, ...] = ()
    ours: str = ""
    differs: str = ""

    @property
    def link(self) -> str:
        """Link of the source; empty without one."""
        return next((word for word in self.source.split() if word.startswith("https://")), "")

    @property
    def claims(self) -> list[str]:
        """Names of the claims and studies that test it."""
        return [name for run in self.runs if run.startswith("claims ") for name in run.split()[1:]]

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """Protocols and strategies of the comparisons that test it."""
        found = []
        for run in self.runs:
            kind, first, *rest = run.split()
            if kind == "compare":
                found.append((first, rest[0]))
        return found


@cache
def papers() -> dict[str, Paper]:
    """All papers, by name."""
    text = files("fedbn_simulations.papers").joinpath("papers.toml").read_text(encoding="utf-8")
    return {name: _paper(name, fields) for name, fields in tomllib.loads(text).items()}


def _paper(name: str, fields: dict[str, Any]) -> Paper:
    lists = {k: tuple(fields.get(k, ())) for k in ("runs", "published")}
    return Paper(name, fields["source"], **lists, ours=fields.get("ours", ""), differs=fields.get("differs", ""))


def paper(name: str) -> Paper:
    """The paper with a name.

    Raises:
        UserError: unknown name; suggests the nearest one.

    >>> paper("fedtan").comparisons
    [('fedtan', 'fedtan,global-naive,groupnorm,fedbn')]
    """
    if name not in papers():
        raise unknown("paper", name, papers())
    return papers()[name]
