"""Claims of papers, tested again on our data.

Each module in `fedbn_simulations.claims.studies` is a study and is discovered automatically. It has functions that
train one arm with one seed, and ``CLAIMS``: the claims, their sources and their thresholds, fixed before any run.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy

from fedbn.errors import UserError, unknown

Arm = str
Run = Callable[[Arm, int, bool], dict[str, float]]
"""``run(arm, seed, quick)``: measured quantities by name; depends on the arguments only."""

Verdict = Literal["holds", "does not hold", "undecided"]
Drawing = Literal["dots", "curves", "grid"]


@dataclass(frozen=True)
class Claim:
    """A claim and how it is decided.

    Attributes:
        name: name for the command line.
        sentence: the claim in one sentence.
        source: authors, year and link.
        published: the number in the paper, if its text was read; otherwise a remark that it was not verified.
        setting: our data and model.
        run: function that trains one arm with one seed; claims with the same function share its results.
        arms: the variants to compare.
        measure: name of the measured quantity.
        effect: maps the measured quantity by arm (for one seed) to a number; larger values support the claim.
        meaning: description of the effect, with its unit.
        threshold: the claim holds if the whole 95 % interval of the effect is at or above this value.
        drawing: plot of the arms: ``dots``; ``curves`` for arms named "series number"; ``grid`` for arms named
            "row @ column".
        axis: label of the numbers of ``curves``.
        trained: maps an arm to the arm that ``run`` trains for it. Arms can share a training; ``run`` then returns
            their quantities as "measure: arm".
        note: additional information on the verdict.
    """

    name: str
    sentence: str
    source: str
    published: str
    setting: str
    run: Run
    arms: tuple[Arm, ...]
    measure: str
    effect: Callable[[Mapping[Arm, float]], float]
    meaning: str
    threshold: float
    drawing: Drawing = "dots"
    axis: str = ""
    trained: Callable[[Arm], Arm] = str
    note: str = ""

    @property
    def study(self) -> str:
        """Name of the study's module."""
        return self.run.__module__.rpartition(".")[2]


@dataclass(frozen=True)
class Effect:
    """Mean effect over paired seeds with its 95 % interval."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of(effects: Sequence[float]) -> Effect:
        """Compute the mean and Student's t interval of one effect per seed.

        Raises:
            ValueError: fewer than two effects, or one that is not finite.

        >>> effect = Effect.of([0.0, 1.0, 2.0]); effect.mean, round(effect.low, 3), round(effect.high, 3)
        (1.0, -1.484, 3.484)
        """
        values = np.asarray(effects, float)
        if len(values) < 2 or not np.isfinite(values).all():
            raise ValueError(f"an interval needs at least two finite effects, not {list(effects)}")
        mean = float(values.mean())
        half = float(scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
        return Effect(mean, mean - half, mean + half)

    def verdict(self, threshold: float) -> Verdict:
        """Compare the interval with a threshold.

        >>> [Effect(2, 1, 3).verdict(t) for t in (0.5, 2.0, 3.5)]
        ['holds', 'undecided', 'does not hold']
        """
        if self.low >= threshold:
            return "holds"
        return "does not hold" if self.high < threshold else "undecided"


def discover_studies() -> dict[str, tuple[str, tuple[Claim, ...]]]:
    """Title and claims of every study, by name of its module."""
    studies: dict[str, tuple[str, tuple[Claim, ...]]] = {}
    package = importlib.import_module("fedbn_simulations.claims.studies")
    for entry in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        if hasattr(module, "CLAIMS"):
            studies[entry.name] = (str(module.__doc__).splitlines()[0].rstrip("."), module.CLAIMS)
    return studies


def claims(names: Sequence[str] = ()) -> tuple[Claim, ...]:
    """The claims with the given names or of the given studies; all by default.

    Raises:
        UserError: unknown name; suggests the nearest one.
    """
    studies = discover_studies()
    by_name = {c.name: c for _, study_claims in studies.values() for c in study_claims}
    if sum(len(study_claims) for _, study_claims in studies.values()) != len(by_name):
        raise UserError("two claims have the same name: rename one")
    if not names:
        return tuple(by_name.values())
    selected: dict[str, Claim] = {}
    for name in names:
        if name in studies:
            selected |= {c.name: c for c in studies[name][1]}
        elif name in by_name:
            selected[name] = by_name[name]
        else:
            raise unknown("claim or study", name, [*by_name, *studies])
    return tuple(selected.values())
