"""Run claims, keep what comes, decide, and write the ledger: numbers, a page, one figure a study.

A *cell* is one arm with one seed of one study's function. Cells go to worker processes, one torch thread each, and are
appended to a file as they finish; a cell that is there, with the current numerics, is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedbn.errors import UserError
from simulations.claims.claim import Verdict, discover_studies
from simulations.claims.figures import figure
from simulations.claims.notes import TRIED
from simulations.claims.store import FULL_SEEDS, QUICK_SEEDS
from simulations.claims.verdicts import Entry, rerun
from simulations.report.plots import png
from simulations.storage.checkpoint import write_atomically
from simulations.storage.provenance import versions

MARKS: dict[Verdict, str] = {"holds": "✔ holds", "does not hold": "✘ does not hold", "undecided": "? undecided"}


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
classifier (`fedbn.integrations.pretrained`); a factory makes such a network a model of every command:

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
        "What papers on normalization claim, measured again here on small data. A claim *holds* when the whole 95 % "
        "interval of its effect (Student's t over paired seeds) is at or above a threshold written down before the "
        "runs, *does not hold* when it is wholly below, and is else *undecided*. A verdict is about our small data and "
        "model, not about the paper's: it says whether the effect shows here. Intervals are not corrected for their "
        "number. Sizes were meant to fit into an hour on two cores, thresholds set before the runs. After two seeds "
        "had been seen, and not for a verdict, these were changed: rounds of the grid of normalizers at batch 32 (4 to "
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
    known = discover_studies()
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
