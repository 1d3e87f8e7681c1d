"""``fedbn serve`` and ``fedbn demo``: a model for many users over HTTP, and a demo page."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedbn.config import Conditions, Plan, parts
from fedbn.errors import UserError, install_extra
from fedbn_simulations.cli.options import console, options_of, progress_bars

if TYPE_CHECKING:
    from fedbn_simulations.adaptation.check import Decision
    from fedbn_simulations.adaptation.methods import AdaptationMethod
    from fedbn_simulations.adaptation.source_model import SourceModel
    from fedbn_simulations.service.model import ServedModel

Port = Annotated[int, typer.Option(min=0, max=65535, metavar="INTEGER", help="Port; 0 for any free one.")]


@options_of(Conditions, Plan)
def serve(
    options: dict[str, Any],
    scenario: Annotated[
        str | None, typer.Argument(help="Scenario that trains the model, e.g. hapt, watch, hapt:unseen=10.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a scenario: weights of your own --model (.safetensors or .pt).", show_default=False
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Built-in name or package.module:factory.", show_default="the scenario's")
    ] = "",
    shape: Annotated[str, typer.Option(help="With --weights: shape of a window, e.g. 6,128.", show_default=False)] = "",
    classes: Annotated[
        str, typer.Option(help="With --weights: names of the outputs, comma-separated.", show_default=False)
    ] = "",
    rule: Annotated[
        str,
        typer.Option(
            help="What follows users: auto (chosen on seen users' later recordings), source (nothing), or a rule, with "
            "an alignment, a head and /fallback if wanted, e.g. rotation+pseudo:n0=64+matched.",
            show_default="auto for a scenario, source with --weights",
        ),
    ] = "",
    drift: Annotated[
        str,
        typer.Option(
            help="Drift detector: adwin or page-hinkley, with options.",
            show_default="page-hinkley, threshold=18, delta=0.02",
        ),
    ] = "page-hinkley:threshold=18:delta=0.02",
    store: Annotated[Path, typer.Option(help="SQLite file for the users' states.")] = Path("fedbn-users.db"),
    host: Annotated[str, typer.Option(help="Address to listen on; a token is required beyond loopback.")] = "127.0.0.1",
    port: Port = 8000,
    token: Annotated[
        str,
        typer.Option(envvar="FEDBN_TOKEN", help="Bearer token; preferably set in the environment.", show_default=False),
    ] = "",
    rate: Annotated[
        float, typer.Option(help="Requests per second and address, with bursts of twice as many; 0 for no limit.")
    ] = 500.0,
    body: Annotated[int, typer.Option(help="Maximum size of a request body, in bytes.")] = 4_000_000,
    timeout: Annotated[float, typer.Option(help="Maximum duration of a request, in seconds.")] = 10.0,
    user_rate: Annotated[
        float, typer.Option(help="Windows per second and user, with bursts of twice as many; 0 for no limit.")
    ] = 100.0,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain for TLS (PEM).", show_default=False)] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="Private key of the certificate (PEM).", show_default="in --tls-cert")
    ] = None,
    durability: Annotated[
        Literal["full", "relaxed"],
        typer.Option(
            help="full: changes are on disk before they are acknowledged. relaxed: windows without labels within a "
            "second after it."
        ),
    ] = "full",
    capacity: Annotated[int, typer.Option(help="Users held in memory; the others are in the store.")] = 4096,
    held: Annotated[int, typer.Option(help="Windows of all users that may wait for labels.")] = 1024,
    strategy: Annotated[str, typer.Option(help="Strategy of training.", rich_help_panel="Federation")] = "global-naive",
    verbose: Annotated[bool, typer.Option("--verbose", help="Log every request.")] = False,
) -> None:
    """Serve predictions for many users over HTTP and WebSocket, with statistics that follow each user.

    Trains the model first, or reads it from the cache, or serves your own model. The routes are documented at /docs and
    /openapi.json.

    Example: [bold]FEDBN_TOKEN=... fedbn serve hapt --store users.db[/]

    Example: [bold]fedbn serve --model mymodels:net --weights net.safetensors --shape 6,128 --classes sitting,walking[/]
    """
    _need()
    from fedbn.online import SQLiteStore
    from fedbn.online.drift.detectors import detector
    from fedbn_simulations.adaptation.cells import SOURCE
    from fedbn_simulations.adaptation.check import AUTO
    from fedbn_simulations.adaptation.methods import served_rule
    from fedbn_simulations.service import server
    from fedbn_simulations.service.access import Access
    from fedbn_simulations.service.api import create_app, log_start
    from fedbn_simulations.service.model import ServedModel
    from fedbn_simulations.service.observability import log_to_stderr
    from fedbn_simulations.service.users import Limits, UserStore

    access = Access(host, token, rate, body, timeout, user_rate, tls_cert, tls_key)
    limits = Limits(capacity, held)
    rule = rule or (AUTO if weights is None else SOURCE)
    named = None if rule == AUTO else served_rule(rule)
    detector(drift)
    own = None if weights is None else _own_model(scenario, model, weights, shape, classes, rule)
    if own is None and (scenario is None or shape or classes):
        raise UserError("name a scenario, or your own --model with --weights, --shape and --classes")
    # Before training: it takes minutes, and another service may use the store.
    users_file = SQLiteStore(store) if store.exists() else None
    with server.listen(host, port) as listening:
        if own is None:
            source, reason = _trained(strategy, options | {"model": model}, named), ""
            if named is None:
                decision = _decided(source)
                rule, reason = decision.chosen, decision.reason
            served = ServedModel.from_source(source, rule, reason)
        else:
            served = own
        if users_file is None:
            users_file = SQLiteStore(store)
        users = UserStore(
            served.model,
            served.shape,
            served.classes,
            served.rule,
            served.prior,
            users_file,
            drift,
            limits,
            served.task,
            served.outputs,
            served.align,
            served.head,
            served.reason,
            served.sensors,
        )
        log_to_stderr(verbose)
        url = server.address(host, listening, tls=tls_cert is not None)
        app = create_app(users, access, durability=durability)

        def on_ready() -> None:
            log_start(url, users)
            console.print(f"serving on {url}, documented at {url}/docs (press Ctrl-C to stop)", soft_wrap=True)

        server.run(app, access, listening, on_ready)


@options_of(Plan)
def demo(
    options: dict[str, Any],
    scenario: Annotated[str, typer.Argument(help="hapt or watch, with options, e.g. hapt:unseen=10.")] = "hapt",
    port: Port = 8765,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
) -> None:
    """Open a demo page that shows online adaptation to people the model has never seen.

    Trains the model the first time (a minute or two) and caches it. Press Ctrl-C to stop.

    Example: [bold]fedbn demo watch --no-browser --port 0[/]
    """
    _need()
    from fedbn_simulations.service import server
    from fedbn_simulations.service.access import Access
    from fedbn_simulations.service.api import create_app
    from fedbn_simulations.service.demo.routes import routes
    from fedbn_simulations.service.demo.session import Playground, demo_scenario
    from fedbn_simulations.service.observability import log_to_stderr
    from fedbn_simulations.service.users import UserStore

    demo_scenario(scenario)
    access = Access()
    with server.listen(access.host, port) as listening:
        source = _trained("global-naive", options | {"scenario": scenario})
        decision = _decided(source)
        playground = Playground.from_source(source, decision.chosen, decision.reason)
        users = UserStore(source.model, playground.shape, playground.classes, prior=source.prior)
        log_to_stderr(verbose=False)
        url = server.address(access.host, listening)

        def ready() -> None:
            console.print(f"open {url}  (press Ctrl-C to stop)", soft_wrap=True)
            if browser:
                import webbrowser

                webbrowser.open(url)

        server.run(create_app(users, access, routes(playground)), access, listening, ready)
    console.print("stopped")


def _need() -> None:
    needed = ("fastapi", "uvicorn", "websockets", "prometheus_client", "orjson", "river")
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(f"this needs {', '.join(missing)}: {install_extra('demo')}")


def _own_model(scenario: str | None, model: str, weights: Path, shape: str, classes: str, rule: str) -> ServedModel:
    from fedbn_simulations.adaptation.check import AUTO
    from fedbn_simulations.service.model import ServedModel

    if scenario is not None or not model or not shape or not classes:
        raise UserError("--weights needs --model, --shape and --classes, and no scenario")
    if rule == AUTO:
        raise UserError("--rule auto needs seen users to decide, and --weights have none: name a rule, or source")
    sides = shape.split(",")
    if not all(n.strip().isdecimal() and int(n) for n in sides):
        raise UserError(f"--shape takes positive whole numbers such as 6,128, not {shape!r}")
    return ServedModel.from_weights(model, weights, tuple(map(int, sides)), parts(classes), rule)


def _trained(strategy: str, options: dict[str, Any], method: AdaptationMethod | None = None) -> SourceModel:
    """The source model; read from the cache if it was trained before with the current numerics.

    Raises:
        UserError: before training, also if the rule does not fit the task or the data.
    """
    from fedbn.federation.run import task_of
    from fedbn_simulations.adaptation.methods import check_classes
    from fedbn_simulations.adaptation.source_model import train_source_model, untrained_source_model
    from fedbn_simulations.adaptation.study import Study

    study = Study.from_dict(options | {"rules": ("source",), "strategies": (strategy,), "seeds": 1})
    (run,) = study.resolved().runs()
    if method is not None:
        check_classes(task_of(run), [method], (), ())
        if method.align or method.head:
            untrained_source_model(run).sums_for(method)
    with progress_bars(disable=False) as progress:
        training = progress.add_task(f"training on {run.scenario}", total=run.plan.rounds)
        return train_source_model(
            run, _cache(), "grid:stacked", lambda event: progress.update(training, completed=event.round)
        )


def _decided(source: SourceModel) -> Decision:
    """What the seen users of a model decide, printed; checks that ran before are read from the cache."""
    from fedbn_simulations.adaptation.check import decide_stored, number_of_cells

    with progress_bars(disable=False) as progress:
        checking = progress.add_task("checking rules on seen users", total=number_of_cells(source))
        decision = decide_stored(source, _cache(), lambda cell: progress.advance(checking))
    console.print(decision.reason, highlight=False, markup=False)
    return decision


def _cache() -> Path:
    from fedbn.data.packages import cache_dir
    from fedbn_simulations.storage.provenance import NUMERICS

    return cache_dir() / "served" / f"numerics-{NUMERICS}"
