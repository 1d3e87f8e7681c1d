"""Decide claims from stored results."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from simulations.claims.claim import Claim, Effect, Verdict
from simulations.claims.store import Store, cell


@dataclass(frozen=True)
class Entry:
    """A claim decided.

    Attributes:
        claim: what was claimed.
        values: the measured quantity by arm, one number a seed.
        effects: one number a seed.
        effect: their mean with its interval.
        verdict: the interval against the threshold.
        quick: at reduced size.
        seconds: of computing, all cells together.
    """

    claim: Claim
    values: dict[str, list[float]]
    effects: list[float]
    effect: Effect
    verdict: Verdict
    quick: bool
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        c = self.claim
        words = ("name", "sentence", "source", "published", "setting", "measure", "meaning", "threshold", "study")
        return {
            **{k: getattr(c, k) for k in words},
            "values": self.values,
            "effects": self.effects,
            **asdict(self.effect),
            "verdict": self.verdict,
            "quick": self.quick,
            "seconds": round(self.seconds, 1),
            "rerun": rerun(self),
        }


def rerun(entry: Entry) -> str:
    """The command that measures a claim again."""
    return f"fedbn claims {entry.claim.name}{' --quick' * entry.quick} --seeds {len(entry.effects)}"


def decide(claim: Claim, store: Store, quick: bool) -> Entry | None:
    """The ledger's entry of a claim, from all seeds whose arms are all there; None for fewer than two."""
    seeds = sorted({k.seed for k in store.found})
    whole = [s for s in seeds if all(cell(claim, arm, s, quick) in store.found for arm in claim.arms)]
    if len(whole) < 2:
        return None
    used = {key: store.found[key] for s in whole for arm in claim.arms for key in [cell(claim, arm, s, quick)]}
    values = {arm: [_value(claim, arm, used[cell(claim, arm, s, quick)]) for s in whole] for arm in claim.arms}
    effects = [float(claim.effect({arm: values[arm][i] for arm in claim.arms})) for i in range(len(whole))]
    effect = Effect.of(effects)
    seconds = sum(line["seconds"] for line in used.values())
    # Arms that never differ at all would "beat" each other by a threshold of zero.
    tied = effect.low == effect.high == claim.threshold
    return Entry(
        claim, values, effects, effect, "undecided" if tied else effect.verdict(claim.threshold), quick, seconds
    )


def _value(claim: Claim, arm: str, line: dict[str, Any]) -> float:
    measured: dict[str, float] = line["measured"]
    own = f"{claim.measure}: {arm}"
    return measured[own] if own in measured else measured[claim.measure]
