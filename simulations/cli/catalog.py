"""``fedbn list``, ``fedbn audit``, ``fedbn data`` and ``fedbn advise``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbn.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table
from simulations.cli.options import AsJson, Into, console, numbers


class Kind(StrEnum):
    """Kinds of plug-ins that can be listed."""

    STRATEGIES = "strategies"
    PERSONALIZATIONS = "personalizations"
    SCENARIOS = "scenarios"
    MODELS = "models"
    PARTITIONS = "partitions"
    SHIFTS = "shifts"
    RULES = "rules"
    STREAMS = "streams"


def advise(
    directories: Annotated[list[Path], typer.Argument(help="Directories of comparisons.")],
    into: Into = None,
) -> None:
    """Summarize several comparisons: the best strategies, and those not clearly worse."""
    from simulations.report.documents import replace_block
    from simulations.results.advice import advice

    if into is not None:
        replace_block(into, "advice")
    text = advice(directories)
    if into is not None:
        replace_block(into, "advice", text)
    print(text)


def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    into: Into = None,
    as_json: AsJson = False,
) -> None:
    """List strategies, scenarios, models, rules and other plug-ins, including installed ones."""
    rows = _rows(kind)
    if into is not None:
        from simulations.report.documents import replace_block
        from simulations.results.formatting import markdown_table

        replace_block(into, kind.value, markdown_table(rows))
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    console.print(_table(rows))


def audit(
    model: Annotated[str, typer.Argument(help="Built-in name or package.module:factory.")],
    strategy: Annotated[
        str | None, typer.Option(help="Show owners and bytes under this strategy.", show_default=False)
    ] = None,
    shape: Annotated[str, typer.Option(help="Shape of an example, comma-separated.")] = "3,32,32",
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
    full: Annotated[bool, typer.Option("--full", help="One line per entry.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show role, owner and bytes of every state entry, and check for pitfalls of averaging normalized networks."""
    from fedbn.auditing.audit import audit_model
    from simulations.report.audit import show

    if any(not n.is_integer() or n < 1 for n in numbers(shape)):
        raise UserError(f"--shape takes positive whole numbers such as 3,32,32, not {shape!r}")
    found = audit_model(model, strategy, tuple(int(n) for n in numbers(shape)), classes)
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        show(found, console, full=full)


def data() -> None:
    """Show which data sets are installed and intact, and how to install the others."""
    from fedbn.data.packages import status

    rows = [
        {"data": name, "scenario": source.scenario, "package": source.package, "state": state}
        for name, source, state in status()
    ]
    console.print(_table(rows))


def _table(rows: list[dict[str, str]]) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    return table


def _rows(kind: Kind) -> list[dict[str, str]]:
    from fedbn.data.partition import partitions
    from fedbn.data.shift import shifts
    from fedbn.models import models
    from fedbn.online.rules.base import rules
    from fedbn.personalization.base import personalizations
    from fedbn.scenarios.base import scenarios
    from fedbn.strategies.base import strategies
    from fedbn.streams import streams
    from fedbn.tta import methods

    match kind:
        case Kind.STRATEGIES:
            return [{"name": n, "what": s.about, "source": s.source} for n, s in strategies().items()]
        case Kind.PERSONALIZATIONS:
            return [{"name": n, "what": p.about, "source": p.source} for n, p in personalizations().items()]
        case Kind.SCENARIOS:
            return [{"name": n, "what": s.about, "model": s.model} for n, s in scenarios().items()]
        case Kind.MODELS:
            return [{"name": n, "what": m.about} for n, m in models().items()]
        case Kind.PARTITIONS:
            return [{"name": n, "what": p.about} for n, p in partitions().items()]
        case Kind.SHIFTS:
            return [{"name": n, "what": s.about} for n, s in shifts().items()]
        case Kind.RULES:
            # Test-time methods with gradients are options of the same command.
            found = [(n, r.about, r.source) for n, r in rules().items()]
            found += [(n, m.about, m.source) for n, m in methods().items()]
            return [{"name": n, "what": what, "source": source} for n, what, source in sorted(found)]
        case Kind.STREAMS:
            return [{"name": n, "what": s.about} for n, s in streams().items()]
