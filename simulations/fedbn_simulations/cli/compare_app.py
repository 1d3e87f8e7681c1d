"""``fedbn compare --app``: strategies in a user's Flower app."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fedbn.errors import UserError
from fedbn_simulations.cli.options import console, errors
from fedbn_simulations.cli.report import show_comparison

PANEL = "Flower app"

App = Annotated[
    Path | None,
    typer.Option(
        "--app",
        help="Directory of a Flower app, which is used as it is.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
ModelFn = Annotated[
    str | None,
    typer.Option(
        "--model-fn",
        help="Function or class that builds the app's model, as package.module:Net.",
        show_default="model in [tool.fedbn]",
        rich_help_panel=PANEL,
    ),
]
AppSupernodes = Annotated[
    int | None,
    typer.Option("--num-supernodes", min=1, help="Number of nodes.", show_default="the app's", rich_help_panel=PANEL),
]
AppRunConfig = Annotated[
    list[str] | None,
    typer.Option(
        "--run-config",
        "-c",
        help="Override the app's run-config: 'key=value key=\"text\"'; repeatable.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]


def compare_app(
    app: Path,
    model: str | None,
    num_supernodes: int | None,
    run_config: list[str] | None,
    options: dict[str, Any],
    out: Path | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Compare strategies in an app and show the report.

    Raises:
        UserError: an option that has no meaning for an app.
    """
    from fedbn_simulations.experiments.app_comparison import AppExperiment, AppRun
    from fedbn_simulations.experiments.app_comparison import compare_app as run_comparison
    from fedbn_simulations.experiments.options import DEFAULT_APP_STRATEGIES
    from fedbn_simulations.results.formatting import format_elapsed

    if other := [name for name in options if name not in ("strategies", "seeds", "metric")]:
        raise UserError(
            f"--{other[0].replace('_', '-')} does not go with --app, whose data and training are its own: "
            "change them with --run-config"
        )
    strategies = options.get("strategies", DEFAULT_APP_STRATEGIES)
    own: dict[str, Any] = {"model": model, "num_supernodes": num_supernodes, "run_config": tuple(run_config or ())}
    given = {name: options[name] for name in ("seeds", "metric") if name in options}
    experiment = AppExperiment(app, strategies, **own, **given)
    start = time.perf_counter()
    number = 0

    def report(run: AppRun, result: dict[str, Any]) -> None:
        nonlocal number
        number += 1
        total = len(experiment.strategies) * experiment.seeds
        errors.print(
            f"{number:3d}/{total}  {run.strategy}, seed {run.seed} ({result['seconds']:.1f} s)", highlight=False
        )

    command = shlex.join(["fedbn", *sys.argv[1:]])
    try:
        directory = run_comparison(experiment, out, workers=workers, command=command, report=report)
    except KeyboardInterrupt:
        errors.print("interrupted; the same command continues")
        sys.exit(130)
    if not as_json:
        console.print(f"done in {format_elapsed(start)}")
    show_comparison(directory, as_json)
