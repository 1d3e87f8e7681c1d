"""Decide claims from stored results."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedbn_simulations.claims.claim import Claim, Effect, Verdict
from fedbn_simulations.claims.store import Store, cell
from fedbn_simulations.results.inference import detectable


@dataclass(frozen=True)
class Entry:
    """The result of a claim.

    Attributes:
        claim: the claim.
        values: the measured quantity by arm, one value per seed.
        effects: one effect per seed.
        effect: their mean with its interval.
        verdict: result of comparing the interval with the threshold.
        detectable: smallest distance of the true effect from the threshold that is decided with a probability of 80 %
            with so many seeds.
        quick: whether the runs had reduced size.
        seconds: compute time of all cells.
    """

    claim: Claim
    values: dict[str, list[float]]
    effects: list[float]
    effect: Effect
    verdict: Verdict
    detectable: float
    quick: bool
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values."""
        c = self.claim
        fields = ("name", "sentence", "source", "published", "setting", "measure", "meaning", "threshold", "study")
        return {
            **{k: getattr(c, k) for k in fields},
            "values": self.values,
            "effects": self.effects,
            **asdict(self.effect),
            "verdict": self.verdict,
            "detectable": self.detectable,
            "quick": self.quick,
            "seconds": round(self.seconds, 1),
            "rerun": rerun_command(self),
        }


def rerun_command(entry: Entry) -> str:
    """The command that reproduces an entry."""
    return f"fedbn claims {entry.claim.name}{' --quick' * entry.quick} --seeds {len(entry.effects)}"


def decide(claim: Claim, store: Store, quick: bool) -> Entry | None:
    """Decide a claim from all seeds with results for every arm; None for fewer than two seeds."""
    seeds = sorted({k.seed for k in store.results})
    complete = [s for s in seeds if all(cell(claim, arm, s, quick) in store.results for arm in claim.arms)]
    if len(complete) < 2:
        return None
    used = {key: store.results[key] for s in complete for arm in claim.arms for key in [cell(claim, arm, s, quick)]}
    values = {arm: [_value(claim, arm, used[cell(claim, arm, s, quick)]) for s in complete] for arm in claim.arms}
    effects = [float(claim.effect({arm: values[arm][i] for arm in claim.arms})) for i in range(len(complete))]
    effect = Effect.of(effects)
    seconds = sum(line["seconds"] for line in used.values())
    # Arms that never differ would otherwise "beat" each other with a threshold of zero.
    tied = effect.low == effect.high == claim.threshold
    verdict: Verdict = "undecided" if tied else effect.verdict(claim.threshold)
    return Entry(claim, values, effects, effect, verdict, detectable(np.array(effects)), quick, seconds)


def _value(claim: Claim, arm: str, line: dict[str, Any]) -> float:
    measured: dict[str, float] = line["measured"]
    arm_measure = f"{claim.measure}: {arm}"
    return measured[arm_measure] if arm_measure in measured else measured[claim.measure]
