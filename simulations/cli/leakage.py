"""``fedbn leakage``: measure what clients' statistics give away."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedbn.errors import UserError

if TYPE_CHECKING:
    from fedbn.federation.run import Run

console = Console()


def leakage(
    scenario: Annotated[str, typer.Argument(help="hapt, watch, digits8, ... with options.")],
    strategy: Annotated[str, typer.Option(help="A strategy that sends statistics.")] = "global-pooled",
    controls: Annotated[
        str, typer.Option(help="Protections to compare, comma-separated; none is always measured.")
    ] = "clip=1,clip=1:noise=0.1,clip=1:noise=0.5,clip=1:noise=2",
    seed: Annotated[int, typer.Option(help="Of the run.")] = 0,
    states: Annotated[
        bool, typer.Option("--states", help="Of people's states instead, after each of two recordings.")
    ] = False,
    rounds: Annotated[int | None, typer.Option(help="With --states: rounds of training.")] = None,
    into: Annotated[
        Path | None, typer.Option(help="Put the tables between this document's markers for leakage or leakage-states.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Find users again by the statistics they send, and solve for single windows from consecutive states.

    Example: [bold]fedbn leakage hapt[/]
    """
    from fedbn.federation.run import Run, plan_for
    from simulations.leakage.messages import inversion, measure
    from simulations.report.documents import markdown, replace_block

    if states:
        _states(Run(scenario, strategy, seed, plan=plan_for(scenario, rounds=rounds)), into, as_json)
        return
    if rounds is not None:
        raise UserError("--rounds goes with --states: messages are looked at in the first two rounds")
    if into is not None:
        replace_block(into, "leakage")  # before anything is computed
    run = Run(scenario, strategy, seed, plan=plan_for(scenario))
    leaks = measure(run, ("", *filter(None, (text.strip() for text in controls.split(",")))))
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
        replace_block(into, "leakage", f"{markdown(who)}\n{markdown(what)}")
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
    from simulations.report.documents import markdown, replace_block

    if into is not None:
        replace_block(into, "leakage-states")  # before anything is computed
    leaks = state_leaks(run)
    found = rows(leaks)
    if into is not None:
        replace_block(into, "leakage-states", markdown(found))
    if as_json:
        print(json.dumps([asdict(leak) for leak in leaks], indent=1))
        return
    _print("people found again by the state of a later recording; error of a window solved for", found)
