"""``fedbn compare`` and ``fedbn resume``."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fedbn.config import Plan
from simulations.cli.options import AsJson, Out, RunFile, Scenario, Track, Workers, console, errors, numbers, options_of
from simulations.cli.report import show_comparison
from simulations.experiments.options import GRID, ExperimentOptions


@options_of(ExperimentOptions, Plan)
def compare(
    options: dict[str, Any],
    scenario: Scenario = None,
    run_file: RunFile = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Choose each strategy's learning rate on validation data.", rich_help_panel="Optimization"
        ),
    ] = False,
    grid: Annotated[
        str | None,
        typer.Option(
            help="Learning rates for --tune, comma-separated.",
            show_default=",".join(map(str, GRID)),
            rich_help_panel="Optimization",
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="grid:stacked trains and scores clients side by side; grid, reference and ray agree bit for bit."
        ),
    ] = "grid:stacked",
    workers: Workers = None,
    out: Out = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Compare normalization strategies on the same users, seeds and budget.

    Example: [bold]fedbn compare hapt --strategies global-naive,fedbn,groupnorm[/]
    """
    from simulations.experiments.compare import compare as run_comparison
    from simulations.experiments.experiment import Experiment, read_run_file
    from simulations.experiments.preflight import default_directory, drop_unsupported

    if tune or grid:
        options["tune"] = numbers(grid) if grid else GRID
    everything = options.get("strategies") == ("all",)
    if everything:
        from fedbn.strategies.base import strategies

        options["strategies"] = ("global-naive", *(name for name in strategies() if name != "global-naive"))
    experiment = Experiment.from_dict((read_run_file(run_file) if run_file else {}) | options).resolved()
    notices: list[str] = []
    if everything:
        experiment, notices = drop_unsupported(experiment)
    directory = out or default_directory(experiment)
    command = shlex.join(["fedbn", *sys.argv[1:]])

    def run(**listeners: Any) -> Path:
        return run_comparison(
            experiment, directory, engine=engine, workers=workers, command=command, notices=notices, **listeners
        )

    _show(run, directory, track, as_json)


def resume(
    directory: Annotated[Path, typer.Argument(help="Results directory of a comparison.")],
    rounds: Annotated[
        int | None, typer.Option(help="New number of rounds, to extend the comparison.", min=1, show_default=False)
    ] = None,
    workers: Workers = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Resume an interrupted comparison, or extend it by more rounds.

    The numbers are the same as those of one comparison without the interruption.
    """
    from simulations.experiments.compare import resume as resume_comparison

    def run(**listeners: Any) -> Path:
        return resume_comparison(directory, rounds, workers=workers, **listeners)

    _show(run, directory, track, as_json)


def _show(run: Callable[..., Path], directory: Path, track: list[str] | None, as_json: bool) -> None:
    from simulations.results.formatting import format_elapsed
    from simulations.tracking.progress import Observers, ProgressBar
    from simulations.tracking.trackers import Tracking

    start = time.perf_counter()
    try:
        with ProgressBar(errors) as bar, Tracking(track or ()) as tracking:
            observers = Observers(bar, tracking)
            run(report=observers.report, started=observers.started)
    except KeyboardInterrupt:
        errors.print(f"interrupted; resume with [bold]fedbn resume {directory}[/]")
        sys.exit(130)
    if not as_json:
        console.print(f"done in {format_elapsed(start)}")
    show_comparison(directory, as_json)
