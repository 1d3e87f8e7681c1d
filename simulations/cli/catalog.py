"""``fedbn list``, ``fedbn audit``, ``fedbn data`` and ``fedbn advise``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fedbn.config import ModelSplit
from fedbn.errors import UserError
from simulations.cli.options import (
    AsJson,
    Columns,
    Data,
    Into,
    Metric,
    Scenario,
    console,
    numbers,
    options_of,
    print_table,
    scenario_text,
)


class Kind(StrEnum):
    """Kinds of plug-ins that can be listed."""

    STRATEGIES = "strategies"
    PERSONALIZATIONS = "personalizations"
    SCENARIOS = "scenarios"
    MODELS = "models"
    PARTITIONS = "partitions"
    TASKS = "tasks"
    SHIFTS = "shifts"
    RULES = "rules"
    STREAMS = "streams"
    OPTIMIZERS = "optimizers"
    SCHEDULES = "schedules"
    AUGMENTATIONS = "augmentations"


def advise(
    directories: Annotated[list[Path], typer.Argument(help="Directories of comparisons.")],
    metric: Metric = "",
    into: Into = None,
) -> None:
    """Summarize several comparisons: the best strategies, and those not clearly worse."""
    from simulations.report.documents import replace_block
    from simulations.results.advice import advice

    if into is not None:
        replace_block(into, "advice")
    text = advice(directories, metric)
    if into is not None:
        replace_block(into, "advice", text)
    print(text)


def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")], into: Into = None, as_json: AsJson = False
) -> None:
    """List strategies, scenarios, models, rules and other plug-ins, including installed ones."""
    rows = _rows(kind)
    if into is not None:
        from simulations.report.documents import replace_block
        from simulations.results.formatting import markdown_table

        replace_block(into, kind.value, markdown_table(rows))
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print_table(rows)


@options_of(ModelSplit)
def audit(
    options: dict[str, Any],
    model: Annotated[str, typer.Argument(help="Built-in name or package.module:factory.")],
    strategy: Annotated[
        str | None,
        typer.Option(help="Show owners and bytes under this strategy, e.g. fedbn or fedbn+fedper.", show_default=False),
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
    found = audit_model(model, strategy, tuple(int(n) for n in numbers(shape)), classes, **options)
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        show(found, console, full=full)


def data(
    scenario: Scenario = None,
    data: Data = None,
    columns: Columns = None,
    task: Annotated[
        str, typer.Option(help="Task, e.g. regression; empty for the scenario's.", show_default=False)
    ] = "",
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Show users, classes and splits of a data set; without one, which data sets are installed and intact.

    Example: [bold]fedbn data --data mine.csv --columns y=activity[/]
    """
    from fedbn.data.packages import status
    from fedbn.scenarios.base import scenario as parse
    from fedbn.tasks import parse_task
    from simulations.report.population import describe

    text = scenario_text(scenario, data, columns)
    if text is None:
        print_table(
            [
                {"data": name, "scenario": source.scenario, "package": source.package, "state": state}
                for name, source, state in status()
            ]
        )
        return
    chosen = parse(text)
    population = chosen.load_for(parse_task(task or chosen.task), seed)
    found = describe(population)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console.print(f"examples of shape {list(population.shape)}; {population.skew}", highlight=False, markup=False)
    for kind in ("classes", "users"):
        console.print()
        print_table([{k: str(v) for k, v in row.items()} for row in found[kind]])
    for notice in population.notices:
        console.print(f"Note: {notice}", style="yellow", highlight=False, markup=False)


def _rows(kind: Kind) -> list[dict[str, str]]:
    from fedbn.augment.base import augmentations
    from fedbn.data.partition import partitions
    from fedbn.data.shift import shifts
    from fedbn.models import models
    from fedbn.online.rules.base import rules
    from fedbn.optim.base import optimizers
    from fedbn.optim.schedules import schedules
    from fedbn.personalization.base import personalizations
    from fedbn.plugins import aliases
    from fedbn.scenarios.base import scenarios
    from fedbn.strategies.base import strategies
    from fedbn.streams import streams
    from fedbn.tasks import tasks
    from fedbn.tta import methods

    registries: dict[Kind, tuple[dict[str, Any], tuple[str, ...]]] = {
        Kind.STRATEGIES: (strategies(), ("source",)),
        Kind.PERSONALIZATIONS: (personalizations(), ("source",)),
        Kind.SCENARIOS: (scenarios(), ("model",)),
        Kind.MODELS: (models(), ()),
        Kind.PARTITIONS: (partitions(), ()),
        Kind.TASKS: (tasks(), ()),
        Kind.SHIFTS: (shifts(), ()),
        # Test-time methods with gradients are options of the same command.
        Kind.RULES: (dict(sorted({**rules(), **methods()}.items())), ("source",)),
        Kind.STREAMS: (streams(), ()),
        Kind.OPTIMIZERS: (optimizers(), ()),
        Kind.SCHEDULES: (schedules(), ()),
        Kind.AUGMENTATIONS: (augmentations(), ()),
    }
    known, more = registries[kind]
    rows = []
    for name, part in known.items():
        about = "; also called ".join(filter(None, (part.about, ", ".join(aliases(part)))))
        rows.append({"name": name, "what": about} | {key: getattr(part, key) for key in more})
    return rows
