"""Run claims, keep what comes, decide, and write the ledger: numbers, a page, one figure a study.

A *cell* is one arm with one seed of one study's function. Cells go to worker processes, one torch thread each, and are
appended to a file as they finish; a cell that is there, with the current numerics, is not run again.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import simulations.claims
from fedbn.errors import UserError
from simulations.claims import Claim, Effect, Verdict, bench, studies
from simulations.claims.drawing import figure
from simulations.claims.tried import TRIED
from simulations.plots import png
from simulations.store import NUMERICS, code_digest, versions, write_atomically

FULL_SEEDS, QUICK_SEEDS = 10, 3
"""Paired seeds of a full and of a quick run; with fewer, Student's t leaves nearly everything undecided."""

MARKS: dict[Verdict, str] = {"holds": "✔ holds", "does not hold": "✘ does not hold", "undecided": "? undecided"}


@dataclass(frozen=True)
class Cell:
    """One arm with one seed: the unit of work.

    Attributes:
        study: name of the study's file.
        run: name of its function.
        arm: what to train.
        seed: of everything random.
        quick: at reduced size.
    """

    study: str
    run: str
    arm: str
    seed: int
    quick: bool


def cell(claim: Claim, arm: str, seed: int, quick: bool) -> Cell:
    """The cell that holds an arm of a claim."""
    return Cell(claim.study, claim.run.__name__, claim.trained(arm), seed, quick)


def cells(claims: Sequence[Claim], seeds: int, quick: bool) -> list[Cell]:
    """What the claims need, each cell once; seeds outermost, so that an interrupted run holds whole comparisons."""
    wanted = (cell(c, arm, seed, quick) for seed in range(seeds) for c in claims for arm in c.arms)
    return list(dict.fromkeys(wanted))


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


class Store:
    """Results of cells, in a file of JSON lines; lines of other numerics are left out, and so is a torn last line.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[Cell, dict[str, Any]] = {}
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if line.get("numerics") == numerics(line["cell"]["study"]):
                self.found[Cell(**line["cell"])] = line

    def add(self, key: Cell, measured: dict[str, float], seconds: float) -> None:
        """Keep a result, on disk at once."""
        line = {
            "cell": asdict(key),
            "measured": measured,
            "seconds": seconds,
            "numerics": numerics(key.study),
            "code": code_digest(),
        }
        self.found[key] = line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A torn line must not swallow the one after it.
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * (torn and self.path.stat().st_size > 0) + json.dumps(line) + "\n")


def numerics(study: str) -> list[int]:
    """Versions of the numbers of the library, of the studies' common code and of one study."""
    module = importlib.import_module(f"{simulations.claims.__name__}.{study}")
    return [NUMERICS, bench.NUMERICS, module.NUMERICS]


def measure(key: Cell) -> tuple[dict[str, float], float]:
    """Run one cell; gives what was measured, and seconds.

    Raises:
        ValueError: a measured quantity is not finite.
    """
    torch.set_num_threads(1)
    began = time.perf_counter()
    run = getattr(importlib.import_module(f"{simulations.claims.__name__}.{key.study}"), key.run)
    measured = {k: float(v) for k, v in run(key.arm, key.seed, key.quick).items()}
    if bad := [k for k, v in measured.items() if not math.isfinite(v)]:
        raise ValueError(f"{key}: {', '.join(bad)} not finite")
    return measured, time.perf_counter() - began


def perform(wanted: Sequence[Cell], store: Store, workers: int, done: Callable[[Cell], None]) -> None:
    """Run the cells that the store does not have; every result is kept as it comes."""
    missing = []
    for key in wanted:
        if key in store.found:
            done(key)
        else:
            missing.append(key)
    for key, (measured, seconds) in _results(missing, workers):
        store.add(key, measured, seconds)
        done(key)


def _results(missing: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, tuple[dict[str, float], float]]]:
    if workers <= 1 or len(missing) <= 1:
        for key in missing:
            yield key, measure(key)
        return
    pool = ProcessPoolExecutor(min(workers, len(missing)), mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(measure, key): key for key in missing}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


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


def write(out: Path, entries: Sequence[Entry]) -> Path:
    """Write ``claims.md`` and, under ``claims/``, ``ledger.json`` and one figure a study; gives the page's path.

    Raises:
        UserError: there is nothing to write.
    """
    if not entries:
        raise UserError("no claim has two seeds yet: run some, with --seeds 2 or more")
    content = {"versions": versions(), "claims": [e.as_dict() for e in entries]}
    write_atomically(out / "claims" / "ledger.json", json.dumps(content, indent=1).encode())
    for study, found in by_study(entries).items():
        write_atomically(out / "claims" / f"{study}.png", png(figure(found)))
    page = out / "claims.md"
    write_atomically(page, markdown(entries).encode())
    return page


def by_study(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries grouped by study, in order."""
    out: dict[str, list[Entry]] = {}
    for entry in entries:
        out.setdefault(entry.claim.study, []).append(entry)
    return out


def interval(entry: Entry) -> str:
    """Mean and interval as text, e.g. ``0.031 [0.012, 0.050]``."""
    e = entry.effect
    return f"{e.mean:.3g} [{e.low:.3g}, {e.high:.3g}]"


OWN = """## With recordings or weights of your own

Recordings (EDF, BDF, BrainVision through the extra `fedbn[eeg]`, or `.npz` with `signal`, `rate` and `channels`) are
listed in a table with the columns `file`, `subject` and `label` (1: patient, 0: control); the stroke study's network
and comparators are then measured on subjects left out:

```bash
fedbn eeg cohort.csv --channels F3,F4,T3,T4
```

Weights of torchvision, timm or anybody else are read without running code, and must fit in every entry but the
classifier (`fedbn.pretrained`); a factory makes such a network a model of every command:

```python
import torchvision

from fedbn.pretrained import load_pretrained


def resnet50(shape, classes):
    model = torchvision.models.resnet50(num_classes=classes)
    load_pretrained(model, "resnet50.pth")
    return model
```

```bash
fedbn compare digits --model mymodels:resnet50 --strategies fedbn,fixbn,global-pooled
```
"""


def markdown(entries: Sequence[Entry]) -> str:
    """The page."""
    counts = [sum(e.verdict == v for e in entries) for v in MARKS]
    size = "quick runs: smaller and fewer, for a first look" if entries[0].quick else "full runs"
    seeds = [len(e.effects) for e in entries]
    to = f" to {max(seeds)}" if max(seeds) > min(seeds) else ""
    lines = [
        "# Claims",
        "",
        "What papers on normalisation claim, measured again here on small data. A claim *holds* when the whole 95 % "
        "interval of its effect (Student's t over paired seeds) is at or above a threshold written down before the "
        "runs, *does not hold* when it is wholly below, and is else *undecided*. A verdict is about our small data and "
        "model, not about the paper's: it says whether the effect shows here. Intervals are not corrected for their "
        "number. Sizes were meant to fit into an hour on two cores, thresholds set before the runs. After two seeds "
        "had been seen, and not for a verdict, these were changed: rounds of the grid of normalisers at batch 32 (4 to "
        "16, since nothing had been learnt), epochs of the stroke networks (6 to 4, for time), and the threshold of "
        "`fedtan-messages`, a count, from 0 to -0.5, so that equality counts as holding. *Tried* says what else was "
        "measured where a claim does not hold.",
        "",
        f"Written by `fedbn claims --all{' --quick' * entries[0].quick} --out docs`, which goes on where it was "
        "interrupted.",
        "",
        f"{len(entries)} claims ({size}): {counts[0]} hold, {counts[1]} do not, {counts[2]} are undecided. Seeds done: "
        f"{min(seeds)}{to} of {QUICK_SEEDS if entries[0].quick else FULL_SEEDS}.",
        "",
        "| claim | verdict | effect, 95 % interval | threshold |",
        "|---|---|---|---|",
        *(
            f"| [{e.claim.name}](#{e.claim.name}) | {MARKS[e.verdict]} | {interval(e)} | {e.claim.threshold:g} |"
            for e in entries
        ),
        "",
    ]
    known = studies()
    for study, found in by_study(entries).items():
        lines += [f"## {known[study][0]}", "", f"![{known[study][0]}](claims/{study}.png)", ""]
        for e in found:
            c = e.claim
            arms = ", ".join(f"{arm} {sum(v) / len(v):.4g}" for arm, v in e.values.items())
            lines += [
                f"### {c.name}",
                "",
                f"**{c.sentence}** {c.source}",
                "",
                f"- Published: {c.published}",
                f"- Here: {c.setting}; {len(e.effects)} paired seeds.",
                f"- Measured: {c.meaning}: {interval(e)}, threshold {c.threshold:g}. Means of {c.measure}: {arms}.",
                *([f"- Note: {c.note}."] if c.note else []),
                *([f"- Tried: {TRIED[c.name]}."] if c.name in TRIED and e.verdict != "holds" else []),
                f"- Verdict: **{e.verdict}**. Again: `{rerun(e)}` ({e.seconds:.0f} s of computing).",
                "",
            ]
    return "\n".join([*lines, OWN])
