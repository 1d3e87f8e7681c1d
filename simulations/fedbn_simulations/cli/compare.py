"""``fedbn compare`` and ``fedbn resume``."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fedbn.config import Plan, parts
from fedbn.errors import UserError
from fedbn_simulations.cli.compare_app import App, AppRunConfig, AppSupernodes, ModelFn, compare_app
from fedbn_simulations.cli.options import (
    AsJson,
    Out,
    RunFile,
    Scenario,
    Track,
    Workers,
    console,
    errors,
    field_help,
    options_of,
    suggest,
)
from fedbn_simulations.cli.quiet import CLIENTS
from fedbn_simulations.cli.report import show_comparison
from fedbn_simulations.experiments.options import ExperimentOptions


@options_of(ExperimentOptions, Plan)
def compare(
    options: dict[str, Any],
    scenario: Scenario = None,
    run_file: RunFile = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPTION=VALUES",
            help=field_help(ExperimentOptions, "tune"),
            show_default=False,
            rich_help_panel="Optimization",
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="How clients run: side by side in one tensor program (grid:stacked), or one by one, with results that "
            "agree bit for bit (grid, reference, ray)."
        ),
    ] = "grid:stacked",
    workers: Workers = None,
    out: Out = None,
    track: Track = None,
    as_json: AsJson = False,
    app: App = None,
    model_fn: ModelFn = None,
    num_supernodes: AppSupernodes = None,
    run_config: AppRunConfig = None,
) -> None:
    """Compare normalization strategies on the same users, seeds and budget.

    Example: [bold]fedbn compare hapt --strategies global-naive,fedbn,groupnorm[/]
    """
    own = {"--tune": tune, "--run-file": run_file, "--track": track, "SCENARIO": scenario}
    if app is not None:
        if given := [name for name, value in own.items() if value]:
            raise UserError(f"{given[0]} does not go with --app, whose data and training are its own")
        compare_app(app, model_fn, num_supernodes, run_config, options, out, workers, as_json)
        return
    if num_supernodes:
        raise UserError(f"--num-supernodes goes with --app; in a scenario, {CLIENTS}")
    if model_fn or run_config:
        raise UserError("--model-fn and --run-config go with --app: name the directory of the app")
    from fedbn_simulations.experiments.compare import compare as run_comparison
    from fedbn_simulations.experiments.experiment import Experiment, read_run_file
    from fedbn_simulations.experiments.preflight import default_directory, drop_unsupported

    if tune:
        options["tune"] = candidates_from(tune)
    everything = options.get("strategies") == ("all",)
    if everything:
        from fedbn.strategies.base import strategies

        options["strategies"] = ("global-naive", *(name for name in strategies() if name != "global-naive"))
    experiment = Experiment.from_dict((read_run_file(run_file) if run_file else {}) | options).resolved()
    checked: list[str] | None = None
    if everything:
        experiment, checked = drop_unsupported(experiment)
    directory = out or default_directory(experiment)
    command = shlex.join(["fedbn", *sys.argv[1:]])

    def run(**listeners: Any) -> Path:
        return run_comparison(
            experiment, directory, engine=engine, workers=workers, command=command, checked=checked, **listeners
        )

    run_and_show(run, directory, track, as_json)


class CompareCommand(TyperCommand):
    """A command whose option ``--tune`` takes any number of values: ``--tune lr=0.01,0.1 optimizer=sgd,adamw``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat ``--tune`` before each of its values."""
        repeated: list[str] = []
        for i, argument in enumerate(args):
            if "--tune" in repeated[-2:-1] and re.match(r"\w+=", argument):
                repeated.append("--tune")
            repeated.append(args[i])
        return super().parse_args(ctx, repeated)


def candidates_from(texts: list[str]) -> dict[str, tuple[str, ...]]:
    """Values to tune over by option, from ``OPTION=VALUE,VALUE``.

    Raises:
        UserError: a text is written differently, or an option is given twice.

    >>> candidates_from(["lr=0.01,0.1", "weight-decay=0"])
    {'lr': ('0.01', '0.1'), 'weight_decay': ('0',)}
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in (part for given in texts for part in given.split()):
        option, sep, values = text.partition("=")
        if not sep:
            raise UserError(f"--tune takes OPTION=VALUE,VALUE such as lr=0.01,0.1, not {text!r}")
        name = option.removeprefix("--").replace("-", "_")
        if name in found:
            raise UserError(f"--tune has {name} twice: write all its values after one {name}=")
        found[name] = parts(values)
    return found


def resume(
    directory: Annotated[Path, typer.Argument(help="Results directory of a comparison.")],
    rounds: Annotated[
        int | None, typer.Option(help="New number of rounds, to extend the comparison.", min=1, show_default=False)
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="New number of seeds, to extend the comparison.", min=1, show_default=False)
    ] = None,
    workers: Workers = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Resume an interrupted comparison, or extend it by more rounds or seeds.

    The numbers are the same as those of one comparison without the interruption.
    """
    from fedbn_simulations.experiments.compare import resume as resume_comparison

    def run(**listeners: Any) -> Path:
        return resume_comparison(directory, rounds, seeds, workers=workers, **listeners)

    run_and_show(run, directory, track, as_json)


def run_and_show(
    run: Callable[..., Path], directory: Path, track: list[str] | None = None, as_json: bool = False
) -> None:
    """Run a comparison with progress bars and trackers, and show its results."""
    from fedbn_simulations.results.formatting import format_elapsed
    from fedbn_simulations.tracking.progress import Observers, ProgressBar
    from fedbn_simulations.tracking.trackers import Tracking

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
    comparison = show_comparison(directory, as_json)
    if not as_json:
        _suggest(directory, comparison.meta["experiment"])


def _suggest(directory: Path, experiment: dict[str, Any]) -> None:
    """Commands that continue from a comparison: more rounds, a table for a paper, online adaptation."""
    suggest(
        ("fedbn", "resume", directory, "--rounds", str(2 * experiment["plan"]["rounds"])),
        ("fedbn", "report", directory, "--format", "latex"),
        ("fedbn", "adapt", *_data_options(experiment["scenario"], experiment.get("model", ""))),
    )


def _data_options(text: str, model: str) -> list[str]:
    """A scenario with its model, as written on the command line.

    >>> _data_options("digits8", "mlp"), _data_options("digits8", "small-cnn")
    (['digits8', '--model', 'mlp'], ['digits8'])
    >>> _data_options("files:path=mine.csv:y=activity", "har-cnn")
    ['--data', 'mine.csv', '--columns', 'y=activity', '--model', 'har-cnn']
    """
    from fedbn.scenarios.base import scenario as parse

    options = [text]
    if text.startswith(prefix := "files:path="):
        path, _, columns = text.removeprefix(prefix).partition(":")
        options = ["--data", os.path.relpath(path), *(["--columns", columns] if columns else [])]
    return options if model in ("", parse(text).model) else [*options, "--model", model]
