"""The page of papers: published numbers next to ours, with a verdict for each."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fedbn_simulations.claims.claim import claims
from fedbn_simulations.papers.paper import Paper, papers
from fedbn_simulations.results.formatting import markdown_table
from fedbn_simulations.results.papers import without_link

AGREEMENT = {"holds": "agrees", "does not hold": "does not agree", "undecided": "undecided"}
"""Verdict on a paper's claim, by the verdict on the claim in our setting."""


def verdicts_of(page: str) -> dict[str, str]:
    """Verdict of each claim in the text of the page ``claims.md``.

    >>> verdicts_of("| [toy](claims/toys.md#toy) | ✔ holds | 1 [0, 2] | 0 |")
    {'toy': 'holds'}
    """
    row = r"^\| \[([\w-]+)\]\(claims/\S+\) \| \S+ (holds|does not hold|undecided) \|"
    return dict(re.findall(row, page, re.MULTILINE))


def summarize(paper: Paper, verdicts: Mapping[str, str]) -> tuple[str, str]:
    """What we measured, and the verdict, as Markdown.

    A claim that holds agrees with the paper in direction. Numbers are compared only if nothing differs.
    """
    # A study also has claims of other papers, and our own questions.
    listed = claims(paper.claims) if paper.claims else ()
    tested = [c for c in listed if c.name in paper.claims or (paper.link and paper.link in c.source)]
    found = {c.name: AGREEMENT[verdicts[c.name]] for c in tested if c.name in verdicts}
    links = {c.name: f"[{c.name}](claims/{c.study}.md#{c.name})" for c in tested}
    counts = [
        f"{word}: {', '.join(links[n] for n, v in found.items() if v == word)}"
        for word in AGREEMENT.values()
        if word in found.values()
    ]
    ours = "<br>".join(filter(None, (paper.ours, *counts))) or "not run"
    direction = ", ".join(
        f"{sum(v == word for v in found.values())} {word}" for word in AGREEMENT.values() if word in found.values()
    )
    numbers = f"numbers not comparable ({paper.differs})" if paper.differs else ""
    return ours, "; ".join(filter(None, (f"claims: {direction}" if direction else "", numbers)))


def render(claims_page: str) -> str:
    """The table of the page as Markdown.

    Args:
        claims_page: text of ``claims.md``, whose verdicts are ours.
    """
    verdicts, rows = verdicts_of(claims_page), []
    for entry in papers().values():
        ours, verdict = summarize(entry, verdicts)
        title = without_link(entry.source)
        published = [f"{text} *verified*" for text in entry.published]
        rows.append(
            {
                "name": f"`{entry.name}`",
                "paper": f"[{title}]({entry.link})" if entry.link else title,
                "published": "<br>".join(published) or "not verified",
                "ours": ours,
                "verdict": verdict,
            }
        )
    return markdown_table(rows)
