"""The command line: compare, resume, report, list, audit, data.

Heavy imports happen inside commands, so that ``fedbn --help`` answers at once.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedbn.errors import UserError
from simulations.claims_cli import claims
from simulations.deploy_cli import deploy
from simulations.eeg_cli import eeg
from simulations.export_cli import export
from simulations.leakage_cli import leakage
from simulations.new_cli import new
from simulations.personalise_cli import personalise
from simulations.quiet import quieten
from simulations.report_cli import report, show_comparison
from simulations.service_cli import demo, serve

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    name="fedbn",
    help="How should normalisation be treated when data live with many different users?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(claims)
app.command()(eeg)
app.command()(deploy)
app.command()(personalise)
app.command("personalize", hidden=True)(personalise)
app.command()(serve)
app.command()(demo)
app.command()(report)
app.command()(export)
app.command()(leakage)
app.command()(new)
console = Console()
errors = Console(stderr=True)


class Kind(StrEnum):
    """What can be listed."""

    STRATEGIES = "strategies"
    PERSONALISATIONS = "personalisations"
    SCENARIOS = "scenarios"
    MODELS = "models"
    PARTITIONS = "partitions"
    SHIFTS = "shifts"
    RULES = "rules"
    STREAMS = "streams"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedbn {metadata.version('fedbn')}")
        raise typer.Exit


@app.callback()
def _before(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is, and stop.")
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point: user mistakes become one line and exit code 2; an interruption is exit code 130."""
    sys.path.insert(0, "")  # a model or scenario of the user's lies where the command is given
    try:
        quieten(app)()
    except UserError as error:
        errors.print(f"[bold red]error:[/] {_plain(str(error))}", highlight=False)
        sys.exit(2)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


Out = Annotated[
    Path | None, typer.Option(help="Directory of results; default results/SCENARIO, with a digest if taken.")
]
Track = Annotated[
    list[str] | None,
    typer.Option(help="Also log to tensorboard:DIR, mlflow:DIR or wandb:DIR (offline); repeatable."),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default one a core.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")]


@app.command()
def compare(
    scenario: Annotated[
        str | None, typer.Argument(help="hapt, watch, digits, ... with options as hapt:unseen=10.")
    ] = None,
    run_file: Annotated[Path | None, typer.Option(help="TOML file with the same settings.")] = None,
    data: Annotated[Path | None, typer.Option(help="Your own .npz, .csv, .parquet or datasets directory.")] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="With --data: columns as x=acc:y=activity:user=subject:recording=session."),
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(help="Comma-separated, or 'all'; the first is the reference. STRATEGY+METHOD personalises."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Paired seeds. [default: 3]")] = None,
    model: Annotated[str | None, typer.Option(help="Built-in name or package.module:factory.")] = None,
    partition: Annotated[
        str | None, typer.Option(help="E.g. dirichlet:alpha=0.1:clients=20. [default: natural]")
    ] = None,
    shift: Annotated[
        str | None, typer.Option(help="Feature shift between users, e.g. rotation:strength=0.5,gain.")
    ] = None,
    privacy: Annotated[
        str | None,
        typer.Option(help="Protect clients' messages, e.g. clip=1:noise=0.5 or secure=true."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Communication rounds.")] = None,
    clients_per_round: Annotated[int | None, typer.Option(help="Users drawn a round; default all.")] = None,
    local_epochs: Annotated[int | None, typer.Option(help="Passes over a user's data a round.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Client learning rate.")] = None,
    schedule: Annotated[str | None, typer.Option(help="constant or cosine (over the rounds).")] = None,
    momentum: Annotated[float | None, typer.Option(help="Client momentum.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Client weight decay.")] = None,
    optimizer_state: Annotated[str | None, typer.Option(help="reset or keep (never sent).")] = None,
    weighting: Annotated[str | None, typer.Option(help="samples or uniform.")] = None,
    proximal: Annotated[float | None, typer.Option(help="FedProx mu.")] = None,
    tolerate: Annotated[
        float | None, typer.Option(help="Share of the clients asked that may fail; the rest go on. [default: 0]")
    ] = None,
    user_batches: Annotated[
        bool | None, typer.Option("--user-batches", help="centralised: every batch of one user, as DA-BN trains.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of training steps: float32, or bfloat16 with statistics in float32.")
    ] = None,
    server_optimizer: Annotated[
        str | None, typer.Option(help="none, fedavgm, fedadam, fedyogi, fedadagrad: on parameters only.")
    ] = None,
    server_lr: Annotated[float | None, typer.Option(help="Server learning rate.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Rounds between points on the curve.")] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose each strategy's learning rate on validation data.")
    ] = False,
    grid: Annotated[str | None, typer.Option(help="Learning rates for --tune, comma-separated.")] = None,
    engine: Annotated[
        str,
        typer.Option(help="grid:stacked trains and scores side by side; grid, reference and ray agree bit for bit."),
    ] = "grid:stacked",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    rule: Annotated[
        str | None, typer.Option(help="How clients personalise in the online column, e.g. population:diversity=1.")
    ] = None,
    workers: Workers = None,
    out: Out = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Compare treatments of normalisation on the same users, seeds and budget.

    Example: [bold]fedbn compare hapt --strategies global-naive,fedbn,groupnorm[/]
    """
    from simulations.compare import compare as conduct
    from simulations.compare import default_place, suited
    from simulations.experiment import GRID, Experiment, read_run_file

    values: dict[str, Any] = read_run_file(run_file) if run_file else {}
    if data is not None:
        if scenario:
            raise UserError("give a scenario or --data, not both")
        if ":" in str(data):
            raise UserError(f"a path with a colon cannot be named here: rename {data}")
        scenario = f"files:path={data.resolve()}" + (f":{columns}" if columns else "")
    given = {
        "scenario": scenario,
        "strategies": _strategies(strategies),
        "seeds": seeds,
        "model": model,
        "partition": partition,
        "shift": shift,
        "privacy": privacy,
        "device": device,
        "rule": rule,
        "tune": _numbers(grid) if grid else (GRID if tune else None),
    }
    plan = {
        "rounds": rounds,
        "clients_per_round": clients_per_round,
        "local_epochs": local_epochs,
        "batch_size": batch_size,
        "lr": lr,
        "schedule": schedule,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "optimizer_state": optimizer_state,
        "weighting": weighting,
        "proximal": proximal,
        "tolerate": tolerate,
        "user_batches": user_batches,
        "precision": precision,
        "server_optimizer": server_optimizer,
        "server_lr": server_lr,
        "eval_every": eval_every,
    }
    values |= {k: v for k, v in given.items() if v is not None}
    values["plan"] = dict(values.get("plan", {})) | {k: v for k, v in plan.items() if v is not None}
    experiment = Experiment.from_dict(values).resolved()
    notices: list[str] = []
    if strategies == "all":
        experiment, notices = suited(experiment)
    place = out or default_place(experiment)
    _conduct(
        lambda **told: conduct(
            experiment,
            place,
            engine=engine,
            workers=workers,
            command=shlex.join(["fedbn", *sys.argv[1:]]),
            notices=notices,
            **told,
        ),
        place,
        track,
        as_json,
    )


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(help="Directory of an interrupted comparison.")],
    workers: Workers = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Go on with an interrupted comparison, to the same numbers as if it had never stopped."""
    from simulations.compare import resume as go_on

    _conduct(lambda **told: go_on(directory, workers=workers, **told), directory, track, as_json)


@app.command()
def advise(
    directories: Annotated[list[Path], typer.Argument(help="Directories of comparisons.")],
    into: Annotated[
        Path | None, typer.Option(help="Put the answer into this document, between its markers for 'advice'.")
    ] = None,
) -> None:
    """Say which treatments are best, and which not clearly behind, over several comparisons."""
    from simulations.advice import advice
    from simulations.embed import replace_block

    if into is not None:
        replace_block(into, "advice")
    text = advice(directories)
    if into is not None:
        replace_block(into, "advice", text)
    print(text)


@app.command("list")
def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    into: Annotated[
        Path | None, typer.Option(help="Put the list into this document, between its markers for the kind.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what is there, installed plug-ins included."""
    rows = _rows(kind)
    if into is not None:
        from simulations.embed import markdown, replace_block

        replace_block(into, kind.value, markdown(rows))
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    console.print(_table(rows))


@app.command()
def audit(
    model: Annotated[str, typer.Argument(help="Built-in name or package.module:factory.")],
    strategy: Annotated[str | None, typer.Option(help="Show owners and bytes under this strategy.")] = None,
    shape: Annotated[str, typer.Option(help="Shape of an example, comma-separated.")] = "3,32,32",
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
    full: Annotated[bool, typer.Option("--full", help="One line for every entry.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print role, owner and bytes of every state entry, and lint the traps of averaging normalised networks."""
    from fedbn.auditing import audit_model
    from simulations.audit_view import show

    if any(not n.is_integer() or n < 1 for n in _numbers(shape)):
        raise UserError(f"--shape takes positive whole numbers such as 3,32,32, not {shape!r}")
    found = audit_model(model, strategy, tuple(int(n) for n in _numbers(shape)), classes)
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        show(found, console, full=full)


@app.command()
def data() -> None:
    """Show which data sets are installed and intact, and how to get the others."""
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


def _strategies(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    if text == "all":
        from fedbn.strategy import strategies

        return "global-naive", *(name for name in strategies() if name != "global-naive")
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"expected numbers separated by commas, not {text!r}") from None


def _rows(kind: Kind) -> list[dict[str, str]]:
    from fedbn.data.partition import partitions
    from fedbn.data.shift import shifts
    from fedbn.models import models
    from fedbn.online.rule import rules
    from fedbn.personal import personalisations
    from fedbn.scenario import scenarios
    from fedbn.strategy import strategies
    from fedbn.streams import streams
    from fedbn.tta import methods

    match kind:
        case Kind.STRATEGIES:
            return [{"name": n, "what": s.about, "source": s.source} for n, s in strategies().items()]
        case Kind.PERSONALISATIONS:
            return [{"name": n, "what": p.about, "source": p.source} for n, p in personalisations().items()]
        case Kind.SCENARIOS:
            return [{"name": n, "what": s.about, "model": s.model} for n, s in scenarios().items()]
        case Kind.MODELS:
            return [{"name": n, "what": m.about} for n, m in models().items()]
        case Kind.PARTITIONS:
            return [{"name": n, "what": p.about} for n, p in partitions().items()]
        case Kind.SHIFTS:
            return [{"name": n, "what": s.about} for n, s in shifts().items()]
        case Kind.RULES:
            # Methods with gradients answer to the same command.
            found = [(n, r.about, r.source) for n, r in rules().items()]
            found += [(n, m.about, m.source) for n, m in methods().items()]
            return [{"name": n, "what": what, "source": source} for n, what, source in sorted(found)]
        case Kind.STREAMS:
            return [{"name": n, "what": s.about} for n, s in streams().items()]


def _conduct(conduct: Any, place: Path, track: list[str] | None, as_json: bool) -> None:
    from simulations.progress import Bars, Watchers
    from simulations.trackers import Tracking

    began = time.perf_counter()
    try:
        with Bars(errors) as bars, Tracking(track or ()) as tracking:
            watchers = Watchers(bars, tracking)
            conduct(report=watchers.report, started=watchers.started)
    except KeyboardInterrupt:
        errors.print(f"interrupted; go on with [bold]fedbn resume {place}[/]")
        sys.exit(130)
    if not as_json:
        from simulations.compare import elapsed

        console.print(f"done in {elapsed(began)}")
    show_comparison(place, as_json)
