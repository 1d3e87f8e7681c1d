"""``python -m benchmarks.private_sums``: what clipping and noise on the labeled sums cost in accuracy.

The networks are trained without protection: only the sums behind alignments and matched heads are protected. Unseen
people of HAPT follow the rules in recorded order. Every person is unseen once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedbn.errors import UserError
from fedbn.federation.labeled_sums import parse_sums_method
from fedbn.federation.run import plan_for
from fedbn.federation.setup import build_context
from fedbn.online.prequential_metrics import scores
from fedbn.privacy.accounting import epsilon
from fedbn.privacy.mechanism import parse_privacy
from fedbn_simulations.adaptation.cells import SOURCE, Cell, run_cell
from fedbn_simulations.adaptation.source_model import SourceModel, train_source_model
from fedbn_simulations.adaptation.study import Study
from fedbn_simulations.report.documents import replace_block
from fedbn_simulations.results.formatting import format_number, markdown_table

SCENARIO = "hapt:unseen=5"
RULES = (SOURCE, "rotation", "rotation+matched")


def main(args: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--clip", type=float, default=64.0, help="largest norm of a client's sums per window")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.001, 0.003, 0.01, 0.03, 0.1])
    parser.add_argument("--out", type=Path, default=Path("results/private-sums"), help="directory of trained networks")
    parser.add_argument("--into", type=Path, help="document with a block private-sums")
    chosen = parser.parse_args(args)
    study = Study(SCENARIO, plan=plan_for(SCENARIO), seeds=chosen.seeds).resolved()
    sources = [train_source_model(run, chosen.out, "grid:stacked", lambda event: None) for run in study.runs()]
    protections = ["", f"clip={chosen.clip:g}", *(f"clip={chosen.clip:g}:noise={noise:g}" for noise in chosen.noise)]
    table = markdown_table([_row(sources, text) for text in protections])
    print(table)
    if chosen.into:
        replace_block(chosen.into, "private-sums", table)


def _row(sources: Sequence[SourceModel], privacy: str) -> dict[str, str]:
    found = parse_privacy(privacy)
    releases = sum(parse_sums_method(name).sum_rounds for name in RULES[-1].split("+"))
    spent = epsilon(found.noise / 2, releases, found.delta) if found is not None and found.noise else None
    return {
        "protection": privacy or "none",
        f"epsilon per user, {releases} releases": "" if spent is None else f"{spent:.2g}",
    } | {rule: format_number(_accuracy(sources, rule, privacy)) for rule in RULES}


def _accuracy(sources: Sequence[SourceModel], rule: str, privacy: str) -> float:
    """Mean over unseen people; the sums behind the rule are protected. NaN if nothing can be estimated from them."""
    found = []
    for source in sources:
        context = build_context(replace(source.run, privacy=privacy).resolved())
        cell = Cell(source.run, "unseen", "natural", "cold", rule)
        try:
            traces, _ = run_cell(cell, SourceModel(source.run, source.model, context))
        except UserError:  # noise has made the sums useless
            return float("nan")
        found += [scores(trace, context.task)["accuracy"] for trace in traces]
    return float(np.mean(found))


if __name__ == "__main__":
    main()
