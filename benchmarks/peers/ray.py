"""Flower's simulation on Ray with this project's apps: ``python -m benchmarks.peers.ray RUN THREADS``.

``fedbn compare --engine ray`` starts the same simulation in processes of its own. This program calls it, because each
round must wait for those of the other systems. CPU seconds include Ray's processes.
"""

from __future__ import annotations

import sys
import time

import psutil
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from benchmarks.rounds import Meter, context_from_arguments
from fedbn.federation.context import RunContext
from fedbn.federation.server import Outcome
from fedbn_simulations.server.rounds import Listener, run_rounds


class Configured(ClientApp):
    """The ClientApp of a run, whose nodes have no run config otherwise."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self.run = run

    def __call__(self, message: Message, context: Context) -> Message:
        """Handle a message."""
        from fedbn_clients.app import app  # pickled by name, with this class

        given, context.run_config = context.run_config, {"run": self.run}
        try:
            return app(message, context)
        finally:
            context.run_config = given  # Flower refuses another one


def cpu_seconds() -> float:
    """CPU seconds of this process and of the living ones that it started."""
    total = time.process_time()
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def serve(ctx: RunContext, actors: int) -> None:
    """Run a round for each line on standard input, with one core per actor."""
    meter = Meter(cpu_seconds)
    app = ServerApp()

    def on_round(number: int, outcome: Outcome) -> None:
        meter.reply()
        meter.wait()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        meter.wait()
        run_rounds(grid, ctx.run, Listener(on_round=on_round))

    settings = {"init_args": {"num_cpus": actors}, "client_resources": {"num_cpus": 1}}
    run_simulation(app, Configured(ctx.run.to_json()), len(ctx.population.users), backend_config=settings)


if __name__ == "__main__":
    context, threads = context_from_arguments()
    serve(context, threads)
    sys.exit()
