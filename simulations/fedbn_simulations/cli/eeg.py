"""``fedbn eeg``: the stroke study's network and comparators on your own EEG recordings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedbn.config import parts
from fedbn.errors import UserError
from fedbn_simulations.cli.options import AsJson, console, print_table


def eeg(
    table: Annotated[Path, typer.Argument(help="CSV with the columns file, subject, label (1: patient, 0: control).")],
    channels: Annotated[str, typer.Option(help="Names of the channels, separated by commas.")],
    seconds: Annotated[float, typer.Option(help="Length of a window in seconds, at least 2.")] = 4.0,
    overlap: Annotated[float, typer.Option(help="Overlap of consecutive windows, as a share of their length.")] = 0.0,
    epochs: Annotated[int, typer.Option(min=1, help="Training epochs of the network.")] = 20,
    folds: Annotated[int, typer.Option(min=0, help="Folds of subjects; 0 for leave-one-subject-out.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of folds, weights and batches.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Classify patients and controls from EEG: 1-D CNN with and without BN, and classical comparators.

    Recordings are EDF, BDF, BrainVision or .npz files. Features are relative band powers of windows. No subject is in
    both the training and the test set. For research only; not a diagnosis.

    Example: [bold]fedbn eeg cohort.csv --channels F3,F4,T3,T4[/]
    """
    from fedbn.scenarios.stroke import read_cohort
    from fedbn_simulations.claims.studies.stroke import MEASURES, classical, network

    wanted = list(parts(channels))
    if not wanted:
        raise UserError("give at least one channel: --channels F3,F4")
    made, names = read_cohort(table, wanted, seconds, overlap)
    k = folds or len(names)
    if not 2 <= k <= len(names):
        raise UserError(f"folds={folds}: choose 2 to {len(names)} (the number of subjects), or 0 for leave-one-out")
    found = {
        "1-D CNN with BN": network("bn", [epochs], made, k, seed)[epochs],
        "1-D CNN without": network("none", [epochs], made, k, seed)[epochs],
        **classical(made, k, seed),
    }
    scores = {name: dict(zip(MEASURES, pair, strict=True)) for name, pair in found.items()}
    if as_json:
        print(json.dumps({"subjects": len(names), "windows": len(made.y), "folds": k, "scores": scores}, indent=1))
        return
    print_table([{"rule": name} | {k: f"{v:.3f}" for k, v in row.items()} for name, row in scores.items()])
    console.print(f"{len(made.y)} windows of {len(names)} subjects, {k} folds by subject", highlight=False)
