"""Write the results of claims: a JSON file, an overview, and a page with a figure for each study."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fedbn.errors import UserError
from fedbn.files import write_atomically
from fedbn_simulations.claims.claim import Verdict, discover_studies
from fedbn_simulations.claims.figures import Verdicted, figure, verdicts_figure
from fedbn_simulations.claims.notes import NEXT, TRIED
from fedbn_simulations.claims.verdicts import Entry, rerun_command
from fedbn_simulations.report.style import png
from fedbn_simulations.results.formatting import markdown_table
from fedbn_simulations.results.inference import needed_count
from fedbn_simulations.storage.provenance import versions

MAX_SEEDS = 1000
"""Larger numbers of seeds are not shown."""

MARKS: dict[Verdict, str] = {"holds": "✔ holds", "does not hold": "✘ does not hold", "undecided": "? undecided"}


def write(out: Path, entries: Sequence[Entry]) -> Path:
    """Write ``claims.md``, and to ``claims/`` a page and a figure per study, ``verdicts.png`` and ``claims.json``.

    Returns:
        Path of ``claims.md``.

    Raises:
        UserError: there are no entries.
    """
    if not entries:
        raise UserError("no claim has results for two seeds: run claims with --seeds 2 or more")
    content = {"versions": versions(), "claims": [e.as_dict() for e in entries]}
    write_atomically(out / "claims" / "claims.json", json.dumps(content, indent=1).encode())
    for study, group in by_study(entries).items():
        write_atomically(out / "claims" / f"{study}.png", png(figure(group)))
        write_atomically(out / "claims" / f"{study}.md", render_study(study, group).encode())
    write_atomically(out / "claims" / "verdicts.png", png(verdicts_figure([summarized(e) for e in entries])))
    page = out / "claims.md"
    write_atomically(page, render(entries).encode())
    return page


def by_study(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries grouped by study, in order."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.claim.study, []).append(entry)
    return groups


def format_effect(entry: Entry) -> str:
    """Format an effect and its interval, e.g. ``0.031 [0.012, 0.050]``."""
    e = entry.effect
    return f"{e.mean:.3g} [{e.low:.3g}, {e.high:.3g}]"


def summarized(entry: Entry) -> Verdicted:
    """An entry as the overview shows it."""
    e = entry.effect
    return Verdicted(entry.claim.name, e.mean, e.low, e.high, entry.claim.threshold, entry.verdict)


def _missed(entry: Entry) -> str:
    """How far from the threshold the true effect has to be to be decided."""
    return (
        f"Detectable: with {len(entry.effects)} seeds, a true effect at least {entry.detectable:.3g} above or below "
        "the threshold is decided with a probability of 80 %."
    )


def render_undecided(entries: Sequence[Entry]) -> list[str]:
    """Lines of the section on undecided claims; empty without one."""
    rows = []
    for e in entries:
        if e.verdict == "undecided":
            distance = abs(e.effect.mean - e.claim.threshold)
            needed = needed_count(np.array(e.effects), distance, MAX_SEEDS)
            rows.append(
                {
                    "claim": f"[{e.claim.name}](claims/{e.claim.study}.md#{e.claim.name})",
                    "distance": f"{distance:.2g}",
                    "detectable": f"{e.detectable:.2g}",
                    "seeds": "–" if not distance else str(needed or f"> {MAX_SEEDS}"),
                    "reason and next step": NEXT.get(e.claim.name, ""),
                }
            )
    if not rows:
        return []
    return [
        "## Undecided claims",
        "",
        "*Distance* is that of the measured effect from the threshold. *Detectable* is the smallest true distance that "
        "these seeds decide with a probability of 80 %. *Seeds* is how many seeds would do so if the true effect were "
        "the measured one. More seeds are the next step only where this number is small; and a verdict after more "
        "seeds counts only if their number is fixed before they run.",
        "",
        markdown_table(rows),
    ]


OWN_DATA = """## Using your own recordings or weights

List recordings (EDF, BDF, BrainVision with the extra `fedbn[eeg]`, or `.npz` with `signal`, `rate` and `channels`) in a
table with the columns `file`, `subject` and `label` (1: patient, 0: control). The network and classical methods of the
stroke study are then tested on left-out subjects:

```bash
fedbn eeg cohort.csv --channels F3,F4,T3,T4
```

Weights from torchvision, timm or other sources are loaded without running code and must match the model except for the
classifier (`fedbn.integrations.pretrained`). A factory makes such a network available as a model in all commands:

```python
import torchvision

from fedbn.integrations.pretrained import load_pretrained


def resnet50(shape, classes):
    model = torchvision.models.resnet50(num_classes=classes)
    load_pretrained(model, "resnet50.pth")
    return model
```

```bash
fedbn compare digits --model mymodels:resnet50 --strategies fedbn,fixbn,global-pooled
```
"""


def render(entries: Sequence[Entry]) -> str:
    """Render the overview as Markdown."""
    counts = [sum(e.verdict == v for e in entries) for v in MARKS]
    size = "quick runs of reduced size, for a first impression" if entries[0].quick else "full runs"
    seeds = [len(e.effects) for e in entries]
    num_seeds = f"{min(seeds)} to {max(seeds)}" if max(seeds) > min(seeds) else f"{min(seeds)}"
    table = [
        {
            "claim": f"[{e.claim.name}](claims/{e.claim.study}.md#{e.claim.name})",
            "verdict": MARKS[e.verdict],
            "effect, 95 % interval": format_effect(e),
            "threshold": f"{e.claim.threshold:g}",
        }
        for e in entries
    ]
    studies = discover_studies()
    lines = [
        "# Claims",
        "",
        f"{len(entries)} claims on normalization, most of them of papers, tested on small data ({size}): "
        f"{counts[0]} hold, {counts[1]} do not, {counts[2]} are undecided. Seeds per claim: "
        f"{num_seeds}.",
        "",
        "![Effect of each claim minus its threshold, in half-widths of its interval](claims/verdicts.png)",
        "",
        "A claim *holds* if the whole 95 % interval of "
        "its effect (Student's t over paired seeds) is at or above a threshold that was fixed before the runs. It "
        "*does not hold* if the whole interval is below the threshold, and is *undecided* otherwise. Verdicts apply to "
        "our small data and models, not to those of the papers: they show whether the effect occurs here. Intervals "
        "are not corrected for multiple comparisons.",
        "",
        "| study | claims | hold | do not hold | undecided |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| [{studies[study][0]}](claims/{study}.md) | {len(group)} | "
            + " | ".join(str(sum(e.verdict == v for e in group)) for v in MARKS)
            + " |"
            for study, group in by_study(entries).items()
        ),
        "",
        '<details markdown="1">',
        "<summary>All claims</summary>",
        "",
        markdown_table(table),
        "</details>",
        "",
        *render_undecided(entries),
        "All runs were designed to take about an hour on two cores. After "
        "the first two seeds, three settings were changed, but not because of a verdict: rounds of the grid of "
        "normalizers with batches of 32 (4 to 16, because nothing had been learned), epochs of the stroke networks (6 "
        "to 4, to save time), and the threshold of `fedtan-messages`, a count (0 to -0.5, so that equality counts as "
        "holding). *Also tried* lists other measurements for claims that do not hold.",
        "",
        f"Generated by `fedbn claims --all{' --quick' * entries[0].quick} --out docs`, which resumes after an "
        "interruption.",
        "",
    ]
    return "\n".join([*lines, OWN_DATA])


def render_study(study: str, entries: Sequence[Entry]) -> str:
    """Render the page of a study as Markdown."""
    title = discover_studies()[study][0]
    lines = [f"# {title}", "", f"![{title}]({study}.png)", ""]
    for e in entries:
        c = e.claim
        arms = ", ".join(f"{arm} {sum(v) / len(v):.4g}" for arm, v in e.values.items())
        lines += [
            f"## {c.name}",
            "",
            f"**{c.sentence}** {c.source}",
            "",
            f"- Published: {c.published}",
            f"- Setting: {c.setting}; {len(e.effects)} paired seeds.",
            f"- Measured: {c.meaning}: {format_effect(e)}, threshold {c.threshold:g}. Mean {c.measure}: {arms}.",
            *([f"- Note: {c.note}."] if c.note else []),
            *([f"- {_missed(e)}"] if e.verdict == "undecided" else []),
            *([f"- Also tried: {TRIED[c.name]}."] if c.name in TRIED and e.verdict != "holds" else []),
            f"- Verdict: **{e.verdict}**. Reproduce with `{rerun_command(e)}` ({e.seconds:.0f} s of compute).",
            "",
        ]
    return "\n".join(lines)
