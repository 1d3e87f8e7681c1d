"""``fedbn deploy``: the same run as real processes, and whether it gives the same numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

console = Console()
errors = Console(stderr=True)


def deploy(
    scenario: Annotated[
        str, typer.Argument(help="Scenario with few users; each gets a process.")
    ] = "digits8:users=3:unseen=1",
    strategy: Annotated[str, typer.Option(help="Treatment of normalization.")] = "fedbn",
    rounds: Annotated[int, typer.Option(min=1, help="Communication rounds.")] = 2,
    partition: Annotated[str, typer.Option(help="E.g. dirichlet:alpha=0.1:clients=3.")] = "natural",
    seed: Annotated[int, typer.Option(help="Decides weights, sampling and shuffling.")] = 0,
    tls: Annotated[bool, typer.Option("--tls", help="Encrypt, and let only nodes with a registered key in.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory for how far it has got; the same command goes on from there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Run a federation on Flower's SuperLink with one SuperNode a user, on this machine, and in this process.

    Says whether both gave the same bits (exit code 1 if not). Nothing listens beyond loopback, and no process stays.

    Example: [bold]fedbn deploy digits8:users=3:unseen=1 --strategy silobn --tls[/]
    """
    from fedbn.federation.run import Run, plan_for
    from simulations.engines.deployment import deploy as conduct
    from simulations.engines.deployment import digest

    plan = plan_for(scenario, rounds=rounds, eval_every=rounds)
    run = Run(scenario, strategy, seed=seed, partition=partition, plan=plan).resolved()
    try:
        result = conduct(run, tls=tls, say=lambda text: errors.print(text, highlight=False, markup=False), out=out)
    except KeyboardInterrupt:
        kept = "the same command goes on" if out else "nothing was kept, for want of --out"
        errors.print(f"interrupted; every process was stopped, and {kept}")
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
        found = {"strategy": run.strategy, "rounds": rounds, "tls": tls, "start": round(result.seconds["start"], 1)}
        print(json.dumps(found | {"engines": rows, "differences": result.differences}, indent=1))
    else:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in rows[0]:
            table.add_column(column)
        for row in rows:
            table.add_row(*(f"{v:.4f}" if isinstance(v, float) and k != "seconds" else str(v) for k, v in row.items()))
        console.print(table)
        verdict = "equal to the last bit" if not result.differences else f"DIFFERENT: {', '.join(result.differences)}"
        console.print(f"state, scores and curve: {verdict}", highlight=False)
    if result.differences:
        sys.exit(1)
