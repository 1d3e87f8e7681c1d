"""``fedbn compare`` and ``fedbn resume``."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fedbn.errors import UserError
from simulations.cli.options import AsJson, Out, Track, Workers, _numbers, _strategies, console, errors
from simulations.cli.report import show_comparison


def compare(
    scenario: Annotated[
        str | None, typer.Argument(help="hapt, watch, digits, ... with options as hapt:unseen=10.")
    ] = None,
    run_file: Annotated[Path | None, typer.Option(help="TOML file with the same settings.")] = None,
    data: Annotated[Path | None, typer.Option(help="Your own .npz, .csv, .parquet or datasets directory.")] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="With --data: columns as x=acc:y=activity:user=subject:recording=session."),
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(help="Comma-separated, or 'all'; the first is the reference. STRATEGY+METHOD personalizes."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Paired seeds. [default: 3]")] = None,
    model: Annotated[str | None, typer.Option(help="Built-in name or package.module:factory.")] = None,
    partition: Annotated[
        str | None, typer.Option(help="E.g. dirichlet:alpha=0.1:clients=20. [default: natural]")
    ] = None,
    shift: Annotated[
        str | None, typer.Option(help="Feature shift between users, e.g. rotation:strength=0.5,gain.")
    ] = None,
    privacy: Annotated[
        str | None,
        typer.Option(help="Protect clients' messages, e.g. clip=1:noise=0.5 or secure=true."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Communication rounds.")] = None,
    clients_per_round: Annotated[int | None, typer.Option(help="Users drawn a round; default all.")] = None,
    local_epochs: Annotated[int | None, typer.Option(help="Passes over a user's data a round.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Client learning rate.")] = None,
    schedule: Annotated[str | None, typer.Option(help="constant or cosine (over the rounds).")] = None,
    momentum: Annotated[float | None, typer.Option(help="Client momentum.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Client weight decay.")] = None,
    optimizer_state: Annotated[str | None, typer.Option(help="reset or keep (never sent).")] = None,
    weighting: Annotated[str | None, typer.Option(help="samples or uniform.")] = None,
    proximal: Annotated[float | None, typer.Option(help="FedProx mu.")] = None,
    tolerate: Annotated[
        float | None, typer.Option(help="Share of the clients asked that may fail; the rest go on. [default: 0]")
    ] = None,
    user_batches: Annotated[
        bool | None, typer.Option("--user-batches", help="centralized: every batch of one user, as DA-BN trains.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of training steps: float32, or bfloat16 with statistics in float32.")
    ] = None,
    server_optimizer: Annotated[
        str | None, typer.Option(help="none, fedavgm, fedadam, fedyogi, fedadagrad: on parameters only.")
    ] = None,
    server_lr: Annotated[float | None, typer.Option(help="Server learning rate.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Rounds between points on the curve.")] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose each strategy's learning rate on validation data.")
    ] = False,
    grid: Annotated[str | None, typer.Option(help="Learning rates for --tune, comma-separated.")] = None,
    engine: Annotated[
        str,
        typer.Option(help="grid:stacked trains and scores side by side; grid, reference and ray agree bit for bit."),
    ] = "grid:stacked",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    rule: Annotated[
        str | None, typer.Option(help="How clients personalize in the online column, e.g. population:diversity=1.")
    ] = None,
    workers: Workers = None,
    out: Out = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Compare treatments of normalization on the same users, seeds and budget.

    Example: [bold]fedbn compare hapt --strategies global-naive,fedbn,groupnorm[/]
    """
    from simulations.experiments.compare import compare as conduct
    from simulations.experiments.experiment import GRID, Experiment, read_run_file
    from simulations.experiments.preflight import default_place, suited

    values: dict[str, Any] = read_run_file(run_file) if run_file else {}
    if data is not None:
        if scenario:
            raise UserError("give a scenario or --data, not both")
        if ":" in str(data):
            raise UserError(f"a path with a colon cannot be named here: rename {data}")
        scenario = f"files:path={data.resolve()}" + (f":{columns}" if columns else "")
    given = {
        "scenario": scenario,
        "strategies": _strategies(strategies),
        "seeds": seeds,
        "model": model,
        "partition": partition,
        "shift": shift,
        "privacy": privacy,
        "device": device,
        "rule": rule,
        "tune": _numbers(grid) if grid else (GRID if tune else None),
    }
    plan = {
        "rounds": rounds,
        "clients_per_round": clients_per_round,
        "local_epochs": local_epochs,
        "batch_size": batch_size,
        "lr": lr,
        "schedule": schedule,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "optimizer_state": optimizer_state,
        "weighting": weighting,
        "proximal": proximal,
        "tolerate": tolerate,
        "user_batches": user_batches,
        "precision": precision,
        "server_optimizer": server_optimizer,
        "server_lr": server_lr,
        "eval_every": eval_every,
    }
    values |= {k: v for k, v in given.items() if v is not None}
    values["plan"] = dict(values.get("plan", {})) | {k: v for k, v in plan.items() if v is not None}
    experiment = Experiment.from_dict(values).resolved()
    notices: list[str] = []
    if strategies == "all":
        experiment, notices = suited(experiment)
    place = out or default_place(experiment)
    _conduct(
        lambda **told: conduct(
            experiment,
            place,
            engine=engine,
            workers=workers,
            command=shlex.join(["fedbn", *sys.argv[1:]]),
            notices=notices,
            **told,
        ),
        place,
        track,
        as_json,
    )


def resume(
    directory: Annotated[Path, typer.Argument(help="Directory of an interrupted comparison.")],
    workers: Workers = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Go on with an interrupted comparison, to the same numbers as if it had never stopped."""
    from simulations.experiments.compare import resume as go_on

    _conduct(lambda **told: go_on(directory, workers=workers, **told), directory, track, as_json)


def _conduct(conduct: Any, place: Path, track: list[str] | None, as_json: bool) -> None:
    from simulations.results.formatting import format_elapsed
    from simulations.tracking.progress import Bars, Watchers
    from simulations.tracking.trackers import Tracking

    began = time.perf_counter()
    try:
        with Bars(errors) as bars, Tracking(track or ()) as tracking:
            watchers = Watchers(bars, tracking)
            conduct(report=watchers.report, started=watchers.started)
    except KeyboardInterrupt:
        errors.print(f"interrupted; go on with [bold]fedbn resume {place}[/]")
        sys.exit(130)
    if not as_json:
        console.print(f"done in {format_elapsed(began)}")
    show_comparison(place, as_json)
