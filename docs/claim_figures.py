"""Draw the figures of docs/claims from the numbers of the pages: python docs/claim_figures.py (seconds).

The pages have the mean of each arm, and each effect with its interval. The values of single seeds are in the results of
``fedbn claims`` only, which draws them, too.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

from fedbn.files import write_atomically
from fedbn_simulations.claims.claim import Claim, Effect, discover_studies
from fedbn_simulations.claims.figures import figure, verdicts_figure
from fedbn_simulations.claims.page import summarized
from fedbn_simulations.claims.verdicts import Entry
from fedbn_simulations.report.style import small_png

PAGES = Path(__file__).parent / "claims"
NUMBER = r"(-?[\d.]+(?:e[+-]?\d+)?)"
MEASURED = re.compile(
    rf"- Measured: .*: {NUMBER} \[{NUMBER}, {NUMBER}\], threshold .*?\. Mean .*?: (.*)\.$", re.MULTILINE
)


def entry_of(claim: Claim, text: str) -> Entry:
    """The entry of a claim as far as its section of a page shows it."""
    section = text.partition(f"\n## {claim.name}\n")[2].partition("\n## ")[0]
    found = MEASURED.search(section)
    verdict = re.search(r"- Verdict: \*\*(.*?)\*\*", section)
    if found is None or verdict is None:
        raise ValueError(f"the page has no numbers of {claim.name}")
    mean, low, high, arms = found.groups()
    numbers = re.fullmatch(", ".join(f"{re.escape(arm)} {NUMBER}" for arm in claim.arms), arms)
    if numbers is None:
        raise ValueError(f"the page has {arms!r} for {claim.name}, which now has the arms {list(claim.arms)}")
    values = {arm: [float(value)] for arm, value in zip(claim.arms, numbers.groups(), strict=True)}
    return Entry(claim, values, [], Effect(float(mean), float(low), float(high)), verdict[1], math.nan, False, 0)  # type: ignore[arg-type]


def main() -> None:
    """Draw the figure of each page, and that of all verdicts."""
    entries: list[Entry] = []
    for study, (_, claims) in discover_studies().items():
        page = PAGES / f"{study}.md"
        if page.exists():  # a new study has no page before it was run
            found = [entry_of(claim, page.read_text(encoding="utf-8")) for claim in claims]
            write_atomically(page.with_suffix(".png"), small_png(figure(found)))
            entries += found
    write_atomically(PAGES / "verdicts.png", small_png(verdicts_figure([summarized(entry) for entry in entries])))


if __name__ == "__main__":
    sys.exit(main())
