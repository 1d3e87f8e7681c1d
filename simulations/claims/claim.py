"""Claims of papers, measured again on our data. One file a study; a new one is found by being here.

A study reads like the method section of a short paper. It holds functions that train one arm with one seed, and
``CLAIMS``: what is claimed, by whom, and the threshold that decides, written down before anything is run.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from fedbn.errors import UserError, unknown

Arm = str
Run = Callable[[Arm, int, bool], dict[str, float]]
"""``run(arm, seed, quick)``: measured quantities by name, determined by the arguments alone."""

Verdict = Literal["holds", "does not hold", "undecided"]
Drawing = Literal["dots", "curves", "grid"]


@dataclass(frozen=True)
class Claim:
    """One claim and how it is decided.

    Attributes:
        name: what the command line calls it.
        sentence: the claim, in one sentence.
        source: authors, year, link.
        published: the paper's own number, only where its text was read; else that none was verified.
        setting: our data and model.
        run: trains one arm with one seed; claims with the same function share its results.
        arms: what is compared.
        measure: which of the quantities that ``run`` measures.
        effect: from that quantity by arm, of one seed, a number that the claim wants large.
        meaning: the effect in words, with its unit.
        threshold: the claim holds when the whole 95 % interval of the effect is at or above it.
        drawing: of the arms: ``dots``; ``curves`` of arms called "series number", over the number; or a ``grid`` of
            arms called "row @ column".
        axis: what the numbers of curves are.
        trained: what ``run`` is asked for to know an arm. Arms that read one training share it; what it measures for
            an arm is then called "measure: arm".
        note: what has to be known to read the verdict, or was tried where the claim does not hold.
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
        """Name of the file."""
        return self.run.__module__.rpartition(".")[2]


@dataclass(frozen=True)
class Effect:
    """Mean effect over paired seeds with its 95 % interval."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of(effects: Sequence[float]) -> Effect:
        """Student's t interval, as the seeds are few.

        Raises:
            ValueError: fewer than two seeds, or an effect that is not finite.

        >>> effect = Effect.of([0.0, 1.0, 2.0]); effect.mean, round(effect.low, 3), round(effect.high, 3)
        (1.0, -1.484, 3.484)
        """
        values = np.asarray(effects, float)
        if len(values) < 2 or not np.isfinite(values).all():
            raise ValueError(f"an interval needs two finite effects or more, not {list(effects)}")
        mean = float(values.mean())
        half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
        return Effect(mean, mean - half, mean + half)

    def verdict(self, threshold: float) -> Verdict:
        """What the interval says against a threshold.

        >>> [Effect(2, 1, 3).verdict(t) for t in (0.5, 2.0, 3.5)]
        ['holds', 'undecided', 'does not hold']
        """
        if self.low >= threshold:
            return "holds"
        return "does not hold" if self.high < threshold else "undecided"


def discover_studies() -> dict[str, tuple[str, tuple[Claim, ...]]]:
    """Title and claims of every study, by name of its file."""
    found: dict[str, tuple[str, tuple[Claim, ...]]] = {}
    package = importlib.import_module("simulations.claims.studies")
    for entry in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        if hasattr(module, "CLAIMS"):
            found[entry.name] = (str(module.__doc__).splitlines()[0].rstrip("."), module.CLAIMS)
    return found


def claims(names: Sequence[str] = ()) -> tuple[Claim, ...]:
    """The claims with these names, or of the studies with these names; all by default.

    Raises:
        UserError: an unknown name, with the nearest one.
    """
    known = discover_studies()
    everything = {c.name: c for _, found in known.values() for c in found}
    if sum(len(found) for _, found in known.values()) != len(everything):
        raise UserError("two claims have one name: rename one")
    if not names:
        return tuple(everything.values())
    chosen: dict[str, Claim] = {}
    for name in names:
        if name in known:
            chosen |= {c.name: c for c in known[name][1]}
        elif name in everything:
            chosen[name] = everything[name]
        else:
            raise unknown("claim or study", name, [*everything, *known])
    return tuple(chosen.values())
