"""``fedbn adapt``: online adaptation of a trained model to unseen users."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedbn.config import Plan
from fedbn_simulations.adaptation.options import StudyOptions
from fedbn_simulations.cli.options import (
    AsJson,
    Into,
    RunFile,
    Scenario,
    Track,
    console,
    errors,
    options_of,
    progress_bars,
    suggest,
)


@options_of(StudyOptions, Plan)
def adapt(
    options: dict[str, Any],
    scenario: Scenario = None,
    run_file: RunFile = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of results.", show_default="results/adapt-SCENARIO", rich_help_panel="Output"),
    ] = None,
    into: Into = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Adapt a trained model online to users it has never seen, and compare several rules on the same data.

    The default rule, auto, is chosen on later recordings of the seen users; if none helps them, nothing is adapted.

    Example: [bold]fedbn adapt hapt --rules auto,pseudo:n0=64,ema:rate=0.1 --starts cold,recording[/]
    """
    from fedbn_simulations.adaptation.check import AUTO, warnings
    from fedbn_simulations.adaptation.results import metric_of, notices, write
    from fedbn_simulations.adaptation.study import Study, run_study
    from fedbn_simulations.adaptation.tables import describe, summary_table, update_study_document
    from fedbn_simulations.adaptation.tracking import log_study, tasks
    from fedbn_simulations.experiments.experiment import read_run_file
    from fedbn_simulations.experiments.tasks import Event
    from fedbn_simulations.tracking.trackers import Tracking

    study = Study.from_dict((read_run_file(run_file) if run_file else {}) | options)
    place = out or Path("results") / f"adapt-{study.scenario.split(':')[0]}"
    with Tracking(track or ()) as tracking, progress_bars(disable=not errors.is_terminal) as progress:
        tracking.started("training", tasks(study, place))
        training = progress.add_task("training", total=len(study.runs()) * study.plan.rounds)
        checking = progress.add_task("checking on seen users", total=len(study.runs()))
        streaming = progress.add_task("following", total=None)
        rounds_done: dict[str, int] = {}

        def trained(event: Event) -> None:
            tracking.report(event)
            rounds_done[event.directory] = event.round
            progress.update(training, completed=sum(rounds_done.values()))

        study, results, decisions = run_study(
            study,
            place,
            report=trained,
            began=lambda cells: progress.update(streaming, total=len(cells), completed=0),
            done=lambda cell: progress.advance(streaming),
            checked=lambda run: progress.advance(checking),
        )
        found = write(place, study, results, shlex.join(["fedbn", *sys.argv[1:]]), decisions)
        log_study(tracking, study, results, found)
    if into:
        update_study_document(place, into)
    if as_json:
        print(json.dumps(json.loads(found.to_json(orient="records")), indent=1))
        return
    console.print(summary_table(found, study, metric_of(study), console.width))
    for run, decision in decisions.items():
        if AUTO in study.rules:
            console.print(f"{describe(run, study)}{decision.reason}", highlight=False, markup=False)
        for warning in warnings(decision, study.rules):
            console.print(f"Warning: {describe(run, study)}{warning}", style="yellow", highlight=False, markup=False)
    for notice in notices(study):
        console.print(f"Note: {notice}", style="yellow", highlight=False, markup=False)
    console.print(f"more: {place.resolve()}", soft_wrap=True)
    suggest(("fedbn", "serve", study.scenario, "--store", "users.db"), ("fedbn", "compare", study.scenario))
