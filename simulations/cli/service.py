"""``fedbn serve`` and ``fedbn demo``: a model for many users over HTTP, and a page that shows it at work."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedbn.errors import UserError

if TYPE_CHECKING:
    from fedbn.online import Rule
    from simulations.adaptation.source_model import SourceModel
    from simulations.service.model import Served

console = Console()
errors = Console(stderr=True)

Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]
Rounds = Annotated[int | None, typer.Option(help="Communication rounds of training.")]


def serve(
    scenario: Annotated[
        str | None, typer.Argument(help="Whose data train the model, e.g. hapt, watch, hapt:unseen=10.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Instead of a scenario: weights of your own --model, .safetensors or .pt.")
    ] = None,
    model: Annotated[str, typer.Option(help="Built-in name or package.module:factory.")] = "",
    shape: Annotated[str, typer.Option(help="With --weights: shape of a window, e.g. 6,128.")] = "",
    classes: Annotated[str, typer.Option(help="With --weights: names of the outputs, comma-separated.")] = "",
    rule: Annotated[str, typer.Option(help="How statistics follow users.")] = "pseudo:n0=64",
    drift: Annotated[str, typer.Option(help="Detector: adwin or page-hinkley, with options.")] = (
        "page-hinkley:threshold=18:delta=0.02"
    ),
    store: Annotated[Path, typer.Option(help="SQLite file of the users' states.")] = Path("fedbn-users.db"),
    host: Annotated[str, typer.Option(help="Address; other than loopback ones need a token.")] = "127.0.0.1",
    port: Port = 8000,
    token: Annotated[
        str, typer.Option(envvar="FEDBN_TOKEN", help="Bearer token; better given in the environment.")
    ] = "",
    rate: Annotated[
        float, typer.Option(help="Requests a second and address, twice as many at once; 0: any number.")
    ] = 500.0,
    body: Annotated[int, typer.Option(help="Bytes of a body.")] = 4_000_000,
    timeout: Annotated[float, typer.Option(help="Seconds for a request.")] = 10.0,
    capacity: Annotated[int, typer.Option(help="Users in memory; the others are in the store.")] = 4096,
    held: Annotated[int, typer.Option(help="Windows that wait for labels, of all users.")] = 1024,
    strategy: Annotated[str, typer.Option(help="Treatment of normalization in training.")] = "global-naive",
    rounds: Rounds = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log every request.")] = False,
) -> None:
    """Answer windows of many users over HTTP and WebSocket, each by statistics that follow them.

    Trains the model first, or takes it from the cache; or serves your own. GET /openapi.json lists the routes, /docs
    shows them.

    Example: [bold]FEDBN_TOKEN=... fedbn serve hapt --store users.db[/]

    Example: [bold]fedbn serve --model mymodels:net --weights net.safetensors --shape 6,128 --classes sitting,walking[/]
    """
    _need()
    from fedbn.online import SQLiteStore
    from fedbn.online.drift.detectors import detector
    from fedbn.online.rules.base import rule as parse_rule
    from simulations.service import server
    from simulations.service.access import Access
    from simulations.service.api import create, log_start
    from simulations.service.model import Served
    from simulations.service.observability import log_to_stderr
    from simulations.service.users import Limits, UserStore

    access = Access(host, token, rate, body, timeout)
    limits = Limits(capacity, held)
    chosen = parse_rule(rule)
    detector(drift)
    own = None if weights is None else _brought(scenario, model, weights, shape, classes, chosen)
    if own is None and (scenario is None or shape or classes):
        raise UserError("name a scenario, or your own --model with --weights, --shape and --classes")
    with server.listen(host, port) as listening:
        served = own or Served.trained(_trained(str(scenario), strategy, rounds, model), chosen)
        users = UserStore(
            served.model, served.shape, served.classes, rule, served.prior, SQLiteStore(store), drift, limits
        )
        log_to_stderr(verbose)
        where = server.address(host, listening)
        server.run(create(users, access), access, listening, lambda: log_start(where, users))


def demo(
    scenario: Annotated[str, typer.Argument(help="hapt or watch, with options as hapt:unseen=10.")] = "hapt",
    port: Port = 8765,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    rounds: Rounds = None,
) -> None:
    """Open a page on which people whom the model has never seen can be watched while their statistics move.

    Trains the model the first time (a minute or two) and keeps it in the cache. Ctrl-C ends it.

    Example: [bold]fedbn demo watch --no-browser --port 0[/]
    """
    _need()
    from simulations.service import server
    from simulations.service.access import Access
    from simulations.service.api import create
    from simulations.service.demo.routes import routes
    from simulations.service.demo.session import Playground, shown
    from simulations.service.observability import log_to_stderr
    from simulations.service.users import UserStore

    shown(scenario)
    access = Access()
    with server.listen(access.host, port) as listening:
        source = _trained(scenario, "global-naive", rounds)
        playground = Playground.of(source)
        users = UserStore(source.model, playground.shape, playground.classes, prior=source.prior)
        log_to_stderr(verbose=False)
        where = server.address(access.host, listening)

        def ready() -> None:
            console.print(f"open {where}  (Ctrl-C ends it)", soft_wrap=True)
            if browser:
                import webbrowser

                webbrowser.open(where)

        server.run(create(users, access, routes(playground)), access, listening, ready)
    console.print("ended")


def _need() -> None:
    needed = ("fastapi", "uvicorn", "websockets", "prometheus_client", "orjson", "river")
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(f"this needs {', '.join(missing)}: pip install 'fedbn[demo]'")


def _brought(scenario: str | None, model: str, weights: Path, shape: str, classes: str, rule: Rule) -> Served:
    from simulations.service.model import Served

    if scenario is not None or not model or not shape or not classes:
        raise UserError("--weights wants --model, --shape and --classes beside it, and no scenario")
    sides = shape.split(",")
    if not all(n.strip().isdecimal() and int(n) for n in sides):
        raise UserError(f"--shape takes positive whole numbers such as 6,128, not {shape!r}")
    names = tuple(filter(None, (name.strip() for name in classes.split(","))))
    return Served.brought(model, weights, tuple(map(int, sides)), names, rule)


def _trained(scenario: str, strategy: str, rounds: int | None, model: str = "") -> SourceModel:
    """The model and the people it has not met; read from the cache if trained before with the current numerics."""
    from fedbn.data.packages import cache_dir
    from simulations.adaptation.source_model import train_source_model
    from simulations.adaptation.study import study_from
    from simulations.storage.provenance import NUMERICS

    wanted = {"scenario": scenario, "rules": ("source",), "strategies": (strategy,), "seeds": 1, "model": model}
    study = study_from(wanted, rounds=rounds)
    (run,) = study.resolved().runs()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=errors) as progress:
        training = progress.add_task(f"training on {scenario}", total=run.plan.rounds)
        return train_source_model(
            run,
            cache_dir() / "served" / f"numerics-{NUMERICS}",
            "grid:stacked",
            lambda event: progress.update(training, completed=event.round),
        )
