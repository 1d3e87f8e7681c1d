"""``fedbn adapt``: train, then follow new people's streams by several rules."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def adapt(
    scenario: Annotated[str, typer.Argument(help="hapt, watch, digits, ... with options as hapt:unseen=10.")],
    rules: Annotated[
        str, typer.Option(help="Comma-separated rules and methods, e.g. pseudo:n0=64,ema,tent; source is always there.")
    ] = "pseudo",
    streams: Annotated[str, typer.Option(help="Comma-separated kinds of stream, e.g. natural,iid,bouts:length=60.")] = (
        "natural,iid"
    ),
    starts: Annotated[str, typer.Option(help="Comma-separated: cold, recording, classes:k=3.")] = "cold",
    strategies: Annotated[
        str, typer.Option("--strategies", "--strategy", help="Comma-separated treatments of normalization in training.")
    ] = "global-naive",
    seeds: Annotated[int, typer.Option(help="Each trains a model and holds out other people.")] = 2,
    model: Annotated[str, typer.Option(help="Built-in name or package.module:factory; default the scenario's.")] = "",
    partition: Annotated[str, typer.Option(help="E.g. dirichlet:alpha=0.1:clients=20.")] = "natural",
    shift: Annotated[str, typer.Option(help="Feature shift between users, e.g. rotation:strength=0.5,gain.")] = "",
    rounds: Annotated[int | None, typer.Option(help="Communication rounds of training.")] = None,
    lr: Annotated[float | None, typer.Option(help="Client learning rate.")] = None,
    user_batches: Annotated[
        bool | None, typer.Option("--user-batches", help="centralized: every batch of one user, as DA-BN trains.")
    ] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Of rules that differ in options alone keep the best on seen users' later data."),
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Directory; default results/adapt-SCENARIO.")] = None,
    into: Annotated[
        Path | None, typer.Option(help="Also put the table into this document, between markers named as --out is.")
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(help="Also log to tensorboard:DIR, mlflow:DIR or wandb:DIR (offline); repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON instead of a table.")] = False,
) -> None:
    """Let rules follow the streams of people the model has never seen.

    Example: [bold]fedbn adapt hapt --rules pseudo:n0=64,ema:rate=0.1 --starts cold,recording[/]
    """
    from simulations.adaptation.cells import Cell
    from simulations.adaptation.results import write
    from simulations.adaptation.study import run_study, study_from
    from simulations.adaptation.tables import summary_table, update_study_document
    from simulations.adaptation.tracking import tasks, tell
    from simulations.experiments.tasks import Event
    from simulations.tracking.trackers import Tracking

    study = study_from(
        {
            "scenario": scenario,
            "rules": _parts(rules),
            "streams": _parts(streams),
            "starts": _parts(starts),
            "strategies": _parts(strategies),
            "seeds": seeds,
            "model": model,
            "partition": partition,
            "shift": shift,
            "device": device,
            "tune": tune,
        },
        rounds=rounds,
        lr=lr,
        user_batches=user_batches,
    )
    place = out or Path("results") / f"adapt-{study.scenario.split(':')[0]}"
    errors = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with (
        Tracking(track or ()) as tracking,
        Progress(
            TextColumn("{task.description}"), *columns, console=errors, disable=not errors.is_terminal
        ) as progress,
    ):
        tracking.started("training", tasks(study, place))
        training = progress.add_task("training", total=len(study.runs()) * study.plan.rounds)
        streaming = progress.add_task("following", total=None)
        rounds_done: dict[str, int] = {}

        def trained(event: Event) -> None:
            tracking.report(event)
            rounds_done[event.directory] = event.round
            progress.update(training, completed=sum(rounds_done.values()))

        def began(cells: list[Cell]) -> None:
            progress.update(streaming, total=len(cells), completed=0)

        study, results = run_study(
            study,
            place,
            report=trained,
            began=lambda cells: began(list(cells)),
            done=lambda cell: progress.advance(streaming),
        )
        found = write(place, study, results, shlex.join(["fedbn", *sys.argv[1:]]))
        tell(tracking, study, results, found)
    if into:
        update_study_document(place, into)
    if as_json:
        print(json.dumps(json.loads(found.to_json(orient="records")), indent=1))
        return
    console = Console()
    console.print(summary_table(found, study))
    console.print(f"more: {place.resolve()}", soft_wrap=True)


def _parts(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))
