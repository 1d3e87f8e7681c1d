"""``fedbn claims``: list claims of papers, and measure them again."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbn.errors import UserError
from fedbn_simulations.cli.options import AsJson, Track, Workers, console, errors, print_table, progress_bars

if TYPE_CHECKING:
    from fedbn_simulations.claims.store import Cell, Store
    from fedbn_simulations.claims.verdicts import Entry
    from fedbn_simulations.tracking.trackers import Tracking


def claims(
    names: Annotated[list[str] | None, typer.Argument(help="Names of claims or studies.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Run every claim.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller runs: minutes instead of an hour.")] = False,
    seeds: Annotated[int | None, typer.Option(min=2, help="Paired seeds.", show_default="10, with --quick 3")] = None,
    out: Annotated[Path, typer.Option(help="Directory for claims.md and claims/.")] = Path("results"),
    workers: Workers = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """List claims of papers, or run them and write their effects, intervals and verdicts to a page.

    Without names or --all, the claims are listed. Results are stored as they arrive; the same command resumes an
    interrupted run.

    Example: [bold]fedbn claims binary --quick[/]
    """
    from fedbn_simulations.claims import claims as chosen

    if not names and not all_:
        _list(as_json)
        return
    if names and all_:
        raise UserError("give names or --all, not both")
    from fedbn.files import locked
    from fedbn_simulations.claims.page import MARKS, format_effect, write
    from fedbn_simulations.claims.store import FULL_SEEDS, QUICK_SEEDS, Store, cells
    from fedbn_simulations.claims.verdicts import decide
    from fedbn_simulations.tracking.trackers import Tracking

    wanted = chosen(names or ())
    count = seeds or (QUICK_SEEDS if quick else FULL_SEEDS)
    todo = cells(wanted, count, quick)
    with Tracking(track or ()) as tracking, locked(out / "claims"):
        store = Store(out / "claims" / "cells.jsonl")
        try:
            _run_cells(todo, store, workers or os.cpu_count() or 1)
        except KeyboardInterrupt:
            errors.print("interrupted; finished results are stored, the same command resumes")
            sys.exit(130)
        # The page shows all stored results, not only those of this call.
        entries = [e for c in chosen() if (e := decide(c, store, quick)) is not None]
        page = write(out, entries)
        asked = {c.name for c in wanted}
        shown = [e for e in entries if e.claim.name in asked]
        for e in shown:
            _tell(tracking, e)
    if as_json:
        print(json.dumps([e.as_dict() for e in shown], indent=1))
        return
    rows = [
        {"claim": e.claim.name, "verdict": MARKS[e.verdict]}
        | {"effect [95 % interval]": format_effect(e), "threshold": f"{e.claim.threshold:g}"}
        for e in shown
    ]
    print_table(rows)
    console.print(f"page: {page.resolve()}", soft_wrap=True)


def _tell(tracking: Tracking, entry: Entry) -> None:
    """Log a claim as a run: one step per seed, and with the last one the mean and its interval."""
    about = {k: v for k, v in entry.as_dict().items() if isinstance(v, (str, float))}
    points = {
        seed: {"effect": effect, **{arm: values[seed] for arm, values in entry.values.items()}}
        for seed, effect in enumerate(entry.effects)
    }
    found = entry.effect
    points[len(points) - 1] |= {"effect_mean": found.mean, "effect_low": found.low, "effect_high": found.high}
    tracking.log_run(entry.claim.name, about, points)


def _list(as_json: bool) -> None:
    from fedbn_simulations.claims import claims as chosen

    rows = [{"name": c.name, "study": c.study, "claim": c.sentence, "source": c.source} for c in chosen()]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print_table(rows, text="claim", optional=("source", "study"))
        console.print(f"run one: fedbn claims {rows[0]['name']} --quick", highlight=False, markup=False)


def _run_cells(todo: list[Cell], store: Store, workers: int) -> None:
    from fedbn_simulations.claims.store import run_cells

    with progress_bars(disable=not errors.is_terminal) as progress:
        bar = progress.add_task("claims", total=len(todo))

        def done(key: Cell) -> None:
            progress.advance(bar)
            progress.console.print(f"{key.study}: {key.arm}, seed {key.seed}", highlight=False)

        run_cells(todo, store, workers, done)
