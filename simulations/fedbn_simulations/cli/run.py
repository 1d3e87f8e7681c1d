"""``fedbn run``: any Flower app in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AppDirectory = Annotated[Path, typer.Argument(help="Directory of a Flower app, with its pyproject.toml.")]
NumSupernodes = Annotated[
    int | None,
    typer.Option(
        "--num-supernodes", min=1, help="Number of nodes.", show_default="the app's default federation, else 2"
    ),
]
RunConfig = Annotated[
    list[str] | None,
    typer.Option(
        "--run-config",
        "-c",
        help="Override the app's run-config: 'key=value key=\"text\"', or a TOML file; repeatable.",
        show_default=False,
    ),
]


def run(
    app: AppDirectory = Path("."),
    num_supernodes: NumSupernodes = None,
    run_config: RunConfig = None,
    backend: Annotated[str, typer.Option(help="serial, threads or processes: how the clients are called.")] = "serial",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of threads or processes.", show_default="one per core")
    ] = None,
    client_timeout: Annotated[
        float | None, typer.Option(help="Seconds after which a client counts as failed.", show_default="no limit")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the app's global random numbers, by client and call.", show_default="not seeded"),
    ] = None,
) -> None:
    """Run any Flower app in this process: no Ray, no SuperLink, and the app need not be installed.

    Log messages and exit codes are those of Flower's simulation: 0 after success, 1 after an exception of the server.

    Example: [bold]fedbn run examples/quickstart --num-supernodes 10 -c "num-server-rounds=5"[/]
    """
    from fedbn_simulations.flower.processes import preload_workers

    if backend == "processes":
        preload_workers()
    from fedbn_simulations.engines.simulation import run_app
    from fedbn_simulations.flower.apps import FlowerApp

    config = {"num_workers": workers, "client_timeout": client_timeout}
    run_app(FlowerApp.read(app), num_supernodes, run_config or (), backend, config, seed)
