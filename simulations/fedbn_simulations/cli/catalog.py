"""``fedbn list``, ``fedbn audit``, ``fedbn data`` and ``fedbn advise``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fedbn.config import ModelSplit
from fedbn.errors import UserError
from fedbn_simulations.cli.compare_app import App, AppRunConfig, AppSupernodes, ModelFn
from fedbn_simulations.cli.details import describe, print_description
from fedbn_simulations.cli.options import (
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
from fedbn_simulations.results.papers import paper, without_options


class Kind(StrEnum):
    """Kinds of plug-ins that can be listed."""

    STRATEGIES = "strategies"
    PERSONALIZATIONS = "personalizations"
    SCENARIOS = "scenarios"
    MODELS = "models"
    PARTITIONS = "partitions"
    PROTOCOLS = "protocols"
    PAPERS = "papers"
    TASKS = "tasks"
    SHIFTS = "shifts"
    RULES = "rules"
    ALIGNMENTS = "alignments"
    STREAMS = "streams"
    OPTIMIZERS = "optimizers"
    SCHEDULES = "schedules"
    AUGMENTATIONS = "augmentations"


KINDS = {
    Kind.STRATEGIES: "which parts of the model are shared, and how",
    Kind.PERSONALIZATIONS: "personal models on top of a strategy, as in fedbn+ditto",
    Kind.SCENARIOS: "data sets with their users, splits and default training",
    Kind.MODELS: "neural networks",
    Kind.PARTITIONS: "ways to deal one data set to clients",
    Kind.PROTOCOLS: "settings of published benchmarks",
    Kind.PAPERS: "papers that are tested",
    Kind.TASKS: "losses and metrics",
    Kind.SHIFTS: "artificial differences between users",
    Kind.RULES: "online adaptation of one user's statistics",
    Kind.ALIGNMENTS: "corrections of a user's inputs, e.g. of a turned sensor",
    Kind.STREAMS: "orders in which a user's data arrive",
    Kind.OPTIMIZERS: "optimizers of the clients",
    Kind.SCHEDULES: "learning rates over the rounds",
    Kind.AUGMENTATIONS: "changes to training batches",
}
SINGULAR = {Kind.STRATEGIES: "strategy"}
"""Names of one plug-in where the kind has no plural in -s."""

COMBINED = {Kind.STRATEGIES: Kind.PERSONALIZATIONS, Kind.RULES: Kind.ALIGNMENTS}
"""Kinds that are written in the place of another one: --strategies global-naive+fedprox, --rules rotation."""


def advise(
    directories: Annotated[list[Path], typer.Argument(help="Directories of comparisons.")],
    metric: Metric = "",
    into: Into = None,
) -> None:
    """Summarize several comparisons: the best strategies, and those not clearly worse."""
    from fedbn_simulations.report.documents import replace_block
    from fedbn_simulations.results.advice import advice

    if into is not None:
        replace_block(into, "advice")
    text = advice(directories, metric)
    if into is not None:
        replace_block(into, "advice", text)
    print(text)


def list_(
    kind: Annotated[
        Kind | None,
        typer.Argument(help="What to list; without it, the kinds are listed.", metavar="[KIND]", show_default=False),
    ] = None,
    name: Annotated[str | None, typer.Argument(help="One of them, for its options, paper and link.")] = None,
    into: Into = None,
    as_json: AsJson = False,
) -> None:
    """List strategies, data sets (scenarios), models, rules and other plug-ins; with a name, show its details.

    Example: [bold]fedbn list strategies fedbn[/]
    """
    if kind is None:
        print_table([{"kind": kind.value, "what": about} for kind, about in KINDS.items()], text="what")
        console.print("list one: fedbn list KIND", highlight=False, markup=False)
        return
    if kind is Kind.PAPERS:
        _list_papers(name, into, as_json)
        return
    if name is not None:
        if into is not None:
            raise UserError("--into takes a whole list: leave out the name, or leave out --into")
        known = _known(kind)
        if kind in COMBINED:
            known = _known(COMBINED[kind]) | known
        found = describe(known, SINGULAR.get(kind, kind.value.removesuffix("s")), name)
        if as_json:
            print(json.dumps(found, indent=1))
        else:
            print_description(found, console)
        return
    rows = _rows(kind)
    if into is not None:
        from fedbn_simulations.report.documents import replace_block
        from fedbn_simulations.results.formatting import markdown_table

        replace_block(into, kind.value, markdown_table(linked_rows(kind)))
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    lines = [
        {"name": row["name"]}
        | ({"title": _title(part)} if hasattr(part, "title") else {})
        | {"what": without_options(part.about)}
        | {key: value for key, value in row.items() if key not in ("name", "what")}
        for row, part in zip(rows, _known(kind).values(), strict=True)
    ]
    print_table(lines, text="what", optional=("source", "title", "model"), one_line=True)
    console.print(f"more: fedbn list {kind.value} NAME", highlight=False, markup=False)


@options_of(ModelSplit)
def audit(
    options: dict[str, Any],
    model: Annotated[
        str | None, typer.Argument(help="Built-in name or package.module:factory.", show_default=False)
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="Show owners and bytes under this strategy, e.g. fedbn or fedbn+fedper.", show_default=False),
    ] = None,
    shape: Annotated[str, typer.Option(help="Shape of an example, comma-separated.")] = "3,32,32",
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
    full: Annotated[bool, typer.Option("--full", help="One line per entry.")] = False,
    as_json: AsJson = False,
    app: App = None,
    model_fn: ModelFn = None,
    num_supernodes: AppSupernodes = None,
    run_config: AppRunConfig = None,
) -> None:
    """Show role, owner and bytes of every state entry, and check for pitfalls of averaging normalized networks.

    With --app, run a Flower app for two rounds and show what its messages contain and what its server does with it.
    """
    if app is not None:
        if model or strategy:
            raise UserError("--app audits an app as it is: give neither a model nor a strategy")
        _audit_app(app, model_fn, num_supernodes, run_config, as_json)
        return
    if model is None:
        raise UserError("name a model, or the directory of a Flower app with --app")
    from fedbn.auditing.audit import audit_model
    from fedbn_simulations.report.audit import show

    if any(not n.is_integer() or n < 1 for n in numbers(shape)):
        raise UserError(f"--shape takes positive whole numbers such as 3,32,32, not {shape!r}")
    found = audit_model(model, strategy, tuple(int(n) for n in numbers(shape)), classes, **options)
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        show(found, console, full=full)


def _audit_app(
    app: Path, model: str | None, num_supernodes: int | None, run_config: list[str] | None, as_json: bool
) -> None:
    from fedbn_simulations.engines.simulation import failures_end_like_flower
    from fedbn_simulations.experiments.app_audit import audit_app
    from fedbn_simulations.flower.apps import FlowerApp
    from fedbn_simulations.report.audit import show_findings
    from fedbn_simulations.results.formatting import format_size

    with failures_end_like_flower():
        found = audit_app(FlowerApp.read(app), model, num_supernodes, tuple(run_config or ()))
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    server = ", ".join(found.strategies) or "no strategy of flwr.serverapp"
    console.print(f"{found.app}: {found.model}, server with {server}", highlight=False, markup=False)
    print_table(
        [{k: format_size(v) if k.startswith("bytes") else str(v) for k, v in row.items()} for row in found.traffic]
    )
    show_findings(found.findings, console)


def data(
    scenario: Scenario = None,
    data: Data = None,
    columns: Columns = None,
    task: Annotated[
        str, typer.Option(help="Task, e.g. regression; empty for the scenario's.", show_default=False)
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of the unseen users and the splits.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show users, classes and splits of a data set; without one, which data sets are installed and intact.

    Example: [bold]fedbn data --data mine.csv --columns x=acc:y=activity:user=subject[/]
    """
    from fedbn.data.packages import status
    from fedbn.scenarios.base import scenario as parse
    from fedbn.tasks import parse_task
    from fedbn_simulations.report.population import describe as describe_population

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
    found = describe_population(population)
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
    from fedbn.plugins import aliases

    more = {Kind.SCENARIOS: "model"} | dict.fromkeys(
        (Kind.STRATEGIES, Kind.PERSONALIZATIONS, Kind.PROTOCOLS, Kind.RULES, Kind.ALIGNMENTS), "source"
    )
    rows = []
    for name, part in _known(kind).items():
        about = "; also called ".join(filter(None, (part.about, ", ".join(aliases(part)))))
        rows.append({"name": name, "what": about} | ({more[kind]: getattr(part, more[kind])} if kind in more else {}))
    return rows


def _list_papers(name: str | None, into: Path | None, as_json: bool) -> None:
    """List papers, or describe one; ``into`` is a document next to ``claims.md``."""
    from fedbn_simulations.papers import paper, papers

    if into is not None:
        from fedbn_simulations.papers.page import render
        from fedbn_simulations.report.documents import replace_block

        replace_block(into, Kind.PAPERS.value)
        claims_page = into.with_name("claims.md")
        if not claims_page.exists():
            raise UserError(f"{claims_page} does not exist: run `fedbn claims --all --out {into.parent}`")
        replace_block(into, Kind.PAPERS.value, render(claims_page.read_text(encoding="utf-8")))
    shown = [asdict(p) for p in (papers().values() if name is None else [paper(name)])]
    if as_json:
        print(json.dumps(shown if name is None else shown[0], indent=1))
    elif name is None:
        print_table([{"name": p["name"], "source": p["source"]} for p in shown], text="source")
        console.print("run one: fedbn reproduce NAME", highlight=False, markup=False)
    else:
        for key, value in shown[0].items():
            text = value if isinstance(value, str) else "; ".join(value)
            console.print(f"{key}: {text or 'none'}", soft_wrap=True, highlight=False, markup=False)


def linked_rows(kind: Kind) -> list[dict[str, str]]:
    """The rows of a list for documents: the source of each method is a link to its paper."""
    return [
        row | ({"source": paper(part)} if "source" in row else {})
        for row, part in zip(_rows(kind), _known(kind).values(), strict=True)
    ]


def _title(part: type) -> str:
    from fedbn.plugins import title

    return title(part)


def _known(kind: Kind) -> dict[str, Any]:
    """The plug-ins of a kind, by name."""
    from fedbn.augment.base import augmentations
    from fedbn.data.partition import partitions
    from fedbn.data.shift import shifts
    from fedbn.models import models
    from fedbn.online.alignments.base import alignments
    from fedbn.online.rules.base import rules
    from fedbn.optim.base import optimizers
    from fedbn.optim.schedules import schedules
    from fedbn.personalization.base import personalizations
    from fedbn.protocols.base import protocols
    from fedbn.scenarios.base import scenarios
    from fedbn.strategies.base import strategies
    from fedbn.streams import streams
    from fedbn.tasks import tasks
    from fedbn.tta import methods

    # Test-time methods with gradients are options of the same command.
    registries: dict[Kind, Callable[[], Mapping[str, Any]]] = {
        Kind.STRATEGIES: strategies,
        Kind.PERSONALIZATIONS: personalizations,
        Kind.SCENARIOS: scenarios,
        Kind.MODELS: models,
        Kind.PARTITIONS: partitions,
        Kind.PROTOCOLS: protocols,
        Kind.TASKS: tasks,
        Kind.SHIFTS: shifts,
        Kind.RULES: lambda: dict(sorted({**rules(), **methods()}.items())),
        Kind.ALIGNMENTS: alignments,
        Kind.STREAMS: streams,
        Kind.OPTIMIZERS: optimizers,
        Kind.SCHEDULES: schedules,
        Kind.AUGMENTATIONS: augmentations,
    }
    return dict(registries[kind]())
