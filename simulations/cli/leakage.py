"""``fedbn leakage``: measure what clients' statistics give away."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedbn.config import Plan, RunOptions, nest
from fedbn.errors import UserError
from simulations.cli.options import AsJson, Into, console, options_of, parts

if TYPE_CHECKING:
    from fedbn.federation.run import Run


@options_of(RunOptions, Plan, without=("privacy", "rule", "validation"))
def leakage(
    options: dict[str, Any],
    scenario: Annotated[
        str | None, typer.Argument(help="hapt, watch, digits8, ... with options, e.g. hapt:unseen=10.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="A strategy that sends statistics.")] = "global-pooled",
    controls: Annotated[
        str, typer.Option(help="Protections to compare, comma-separated; no protection is always included.")
    ] = "clip=1,clip=1:noise=0.1,clip=1:noise=0.5,clip=1:noise=2",
    states: Annotated[
        bool,
        typer.Option("--states", help="Measure users' states after each of two recordings, instead of messages."),
    ] = False,
    into: Into = None,
    as_json: AsJson = False,
) -> None:
    """Re-identify users by the statistics they send, and reconstruct single windows from consecutive states.

    Example: [bold]fedbn leakage hapt[/]
    """
    from fedbn.federation.run import Run, plan_for
    from simulations.leakage.messages import inversion, measure
    from simulations.report.documents import replace_block
    from simulations.results.formatting import markdown_table

    values = nest(RunOptions, options | {"strategy": strategy})
    if "scenario" not in values:
        raise UserError("no scenario given: see `fedbn list scenarios`")
    plan = values.pop("plan", {})
    if "rounds" in plan and not states:
        raise UserError("--rounds goes with --states: messages are inspected in the first two rounds")
    run = replace(Run.from_dict(values), plan=plan_for(values["scenario"], **plan))
    if states:
        _states(run, into, as_json)
        return
    if into is not None:
        replace_block(into, "leakage")  # before anything is computed
    leaks = measure(run, ("", *parts(controls)))
    errors = inversion(run)
    who = [
        {"protection": leak.privacy or "none", "layers seen": leak.layers}
        | {"users": str(leak.users), "found": f"{leak.found:.0%}", "chance": f"{leak.chance:.0%}"}
        for leak in leaks
    ]
    what = [
        {"windows a step": "none: guess the mean" if name == "guess" else name}
        | {"error, in units of the spread over windows": f"{error:.2g}"}
        for name, error in errors.items()
    ]
    if into is not None:
        replace_block(into, "leakage", f"{markdown_table(who)}\n{markdown_table(what)}")
    if as_json:
        print(json.dumps({"found": [asdict(leak) for leak in leaks], "inversion": errors}, indent=1))
        return
    _print("users found again by their statistics, one round later", who)
    _print("error of a window's mean per channel, solved for from two states in a row", what)


def _print(title: str, rows: list[dict[str, str]]) -> None:
    table = Table(title=title, box=None)
    for name in rows[0]:
        table.add_column(name)
    for line in rows:
        table.add_row(*line.values())
    console.print(table)


def _states(run: Run, into: Path | None, as_json: bool) -> None:
    from simulations.leakage.states import rows, state_leaks
    from simulations.report.documents import replace_block
    from simulations.results.formatting import markdown_table

    if into is not None:
        replace_block(into, "leakage-states")  # before anything is computed
    leaks = state_leaks(run)
    found = rows(leaks)
    if into is not None:
        replace_block(into, "leakage-states", markdown_table(found))
    if as_json:
        print(json.dumps([asdict(leak) for leak in leaks], indent=1))
        return
    _print("people found again by the state of a later recording; error of a window solved for", found)
