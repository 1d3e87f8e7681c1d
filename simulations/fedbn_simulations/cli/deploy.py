"""``fedbn deploy``: a run as real processes, compared with the same run in this process."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fedbn.config import Plan, RunOptions, nest, parts
from fedbn_simulations.cli.options import AsJson, console, errors, options_of, print_table

DEFAULT = "digits8:users=3:unseen=1"
"""Scenario of a deployment without arguments."""


@options_of(RunOptions, Plan)
def deploy(
    options: dict[str, Any],
    scenario: Annotated[
        str | None, typer.Argument(help="Scenario with few users; each gets a process.", show_default=DEFAULT)
    ] = None,
    tls: Annotated[
        bool,
        typer.Option("--tls", help="Encrypt connections, admit only registered keys, and bind users to keys."),
    ] = False,
    users: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with the public key of each user's node, with the keys beside it; created if missing.",
            show_default="temporary keys",
        ),
    ] = None,
    sums: Annotated[
        str, typer.Option(help="Alignments and heads for which clients send sums after training: rotation,matched.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of checkpoints; the same command resumes from them.",
            show_default="none",
            rich_help_panel="Output",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a federation as separate processes, and check that its result equals the simulation.

    A SuperLink and one SuperNode per user are started on this machine. The exit code is 1 if the results differ by a
    bit. Nothing listens beyond loopback, and all processes are stopped at the end. Without options: strategy fedbn, two
    rounds.

    Example: [bold]fedbn deploy digits8:users=3:unseen=1 --strategy silobn --tls[/]
    """
    from fedbn.federation.run import Run, plan_for
    from fedbn_simulations.engines.deployment import deploy as run_deployed
    from fedbn_simulations.engines.deployment import digest

    values = nest(RunOptions, {"scenario": DEFAULT, "strategy": "fedbn", "rounds": 2} | options)
    plan = {"eval_every": values["plan"]["rounds"]} | values["plan"]
    run = replace(Run.from_dict(values | {"plan": {}}), plan=plan_for(values["scenario"], **plan)).resolved()
    try:
        result = run_deployed(
            run,
            tls=tls,
            notify=lambda text: errors.print(text, highlight=False, markup=False),
            out=out,
            keys=users,
            sums=parts(sums),
        )
    except KeyboardInterrupt:
        state = "the same command resumes" if out else "nothing was saved, because --out was not given"
        errors.print(f"interrupted; every process was stopped, and {state}")
        sys.exit(130)
    rows = [
        {
            "engine": name,
            "seconds": round(result.seconds[timed], 1),
            "own": outcome.curve[-1].own,
            "unseen": outcome.curve[-1].unseen,
            "loss": outcome.curve[-1].train_loss,
            "state": digest(outcome.server.state),
        }
        for name, timed, outcome in (
            (f"SuperLink and {result.users} SuperNodes", "run", result.deployed),
            ("grid in this process", "grid", result.in_process),
        )
    ]
    if as_json:
        found = {"strategy": run.strategy, "rounds": run.plan.rounds, "tls": tls}
        found |= {"start": round(result.seconds["start"], 1), "engines": rows, "differences": result.differences}
        print(json.dumps(found, indent=1))
    else:
        texts = [
            {k: f"{v:.4f}" if isinstance(v, float) and k != "seconds" else str(v) for k, v in row.items()}
            for row in rows
        ]
        print_table(texts)
        verdict = "equal to the last bit" if not result.differences else f"DIFFERENT: {', '.join(result.differences)}"
        console.print(f"state, scores and curve: {verdict}", highlight=False)
    if result.differences:
        sys.exit(1)
