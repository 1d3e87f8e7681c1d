"""``fedbn reproduce``: run what tests a paper, its claims and its protocol."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fedbn.errors import UserError
from fedbn_simulations.cli.claims import claims
from fedbn_simulations.cli.compare import run_and_show
from fedbn_simulations.cli.options import Workers, errors


def reproduce(
    name: Annotated[str, typer.Argument(help="Paper; see fedbn list papers.")],
    path: Annotated[
        str, typer.Option(help="Directory of the data of its protocol; empty to find them.", show_default=False)
    ] = "",
    seeds: Annotated[int | None, typer.Option(min=2, help="Paired seeds.", show_default=False)] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Claims at reduced size; comparisons of two rounds and one seed.")
    ] = False,
    engine: Annotated[str, typer.Option(help="Engine of the comparisons, as in fedbn compare.")] = "grid:stacked",
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("results/papers"),
    workers: Workers = None,
) -> None:
    """Run the claims and the comparison that test a paper. The same command resumes an interrupted run.

    Example: [bold]fedbn reproduce diminishing --quick[/]
    """
    from fedbn_simulations.experiments.compare import compare
    from fedbn_simulations.experiments.experiment import Experiment
    from fedbn_simulations.experiments.preflight import preflight
    from fedbn_simulations.papers import paper

    entry = paper(name)
    shorter = {"rounds": 2, "eval_every": 2, "seeds": 1} if quick else {}
    given = shorter | ({"seeds": seeds} if seeds else {})
    ready = []
    for protocol, strategies in entry.comparisons:
        text = f"{protocol}:path={path}" if path else protocol
        options = {"protocol": text, "strategies": tuple(strategies.split(","))} | given
        directory = out / entry.name / protocol
        try:
            experiment = Experiment.from_dict(options).resolved()
            preflight(experiment, directory)
            ready.append((experiment, directory))
        except UserError as error:
            if not entry.claims:
                raise
            errors.print(f"left out: comparison {protocol}: {error}", style="yellow", highlight=False, markup=False)
    if entry.claims:
        claims(entry.claims, seeds=seeds, quick=quick, out=out, workers=workers)
    command = shlex.join(["fedbn", *sys.argv[1:]])
    for experiment, directory in ready:
        run = partial(compare, experiment, directory, engine=engine, workers=workers, command=command)
        run_and_show(run, directory)
