"""``fedbn leakage``: measure what clients' statistics give away."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from fedbn.config import Plan, RunOptions, nest, parts
from fedbn.errors import UserError
from fedbn_simulations.cli.options import AsJson, Into, options_of, print_table
from fedbn_simulations.cli.options import errors as stderr


@options_of(RunOptions, Plan, without=("privacy", "rule", "validation"))
def leakage(
    options: dict[str, Any],
    scenario: Annotated[
        str | None, typer.Argument(help="hapt, watch, digits8, ... with options, e.g. hapt:unseen=10.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="A strategy that sends statistics.")] = "global-pooled",
    controls: Annotated[
        str,
        typer.Option(
            help="Protections to compare, comma-separated; no protection is always included.",
            show_default="clip=1, clip=1:noise=0.1, clip=1:noise=0.5, clip=1:noise=2",
        ),
    ] = "clip=1,clip=1:noise=0.1,clip=1:noise=0.5,clip=1:noise=2",
    states: Annotated[
        bool, typer.Option("--states", help="Measure users' states after each of two recordings, instead of messages.")
    ] = False,
    sums: Annotated[
        str, typer.Option(help="Measure the labeled sums of alignments and heads, e.g. rotation,matched, instead.")
    ] = "",
    into: Into = None,
    as_json: AsJson = False,
) -> None:
    """Re-identify users by the statistics they send, and reconstruct single windows from consecutive states.

    Example: [bold]fedbn leakage hapt[/]
    """
    from fedbn.federation.run import Run, plan_for
    from fedbn.federation.setup import build_context
    from fedbn_simulations.leakage.messages import inversion, measure
    from fedbn_simulations.leakage.states import rows, state_leaks
    from fedbn_simulations.leakage.sums import measure_sums
    from fedbn_simulations.report.documents import replace_block
    from fedbn_simulations.results.formatting import markdown_table

    values = nest(RunOptions, options | {"strategy": strategy})
    if "scenario" not in values:
        raise UserError("no scenario given: see `fedbn list scenarios`")
    plan = values.pop("plan", {})
    if states and sums:
        raise UserError("give --states or --sums, not both")
    if "rounds" in plan and not (states or sums):
        raise UserError("--rounds goes with --states or --sums: messages are inspected in the first two rounds")
    run = replace(Run.from_dict(values), plan=plan_for(values["scenario"], **plan))
    block = "leakage-states" if states else "leakage-sums" if sums else "leakage"
    if into is not None:
        replace_block(into, block)  # before anything is computed
    found: Any
    if states:
        leaks = state_leaks(run)
        found = [asdict(leak) for leak in leaks]
        tables = {"people found again by the state of a later recording; error of a window solved for": rows(leaks)}
    elif sums:
        labeled = measure_sums(run, parts(sums), ("", *parts(controls)))
        found = [asdict(leak) for leak in labeled]
        lines = [
            {"sums": leak.method, "protection": leak.privacy or "none", "bytes": f"{leak.bytes:,}"}
            | {"users": str(leak.users), "found": f"{leak.found:.0%}", "chance": f"{leak.chance:.0%}"}
            | {"error of class shares": f"{leak.share_error:.2g}", "of a guess": f"{leak.guess_error:.2g}"}
            for leak in labeled
        ]
        tables = {"users found again by the labeled sums of a later recording; shares of their classes": lines}
    else:
        sent, errors = measure(run, ("", *parts(controls))), inversion(run)
        found = {"found": [asdict(leak) for leak in sent], "inversion": errors}
        who = [
            {"protection": leak.privacy or "none", "layers seen": leak.layers}
            | {"users": str(leak.users), "found": f"{leak.found:.0%}", "chance": f"{leak.chance:.0%}"}
            for leak in sent
        ]
        what = [
            {"windows a step": "none: guess the mean" if name == "guess" else name}
            | {"error, in units of the spread over windows": f"{error:.2g}"}
            for name, error in errors.items()
        ]
        tables = {
            "users found again by their statistics, one round later": who,
            "error of a window's mean per channel, solved for from two states in a row": what,
        }
    for notice in build_context(run.resolved()).population.notices:
        stderr.print(f"Note: {notice}", highlight=False, markup=False)
    if into is not None:
        replace_block(into, block, "\n".join(map(markdown_table, tables.values())))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for title, lines in tables.items():
        print_table(lines, title=title)
