"""The in-process grid: ``python -m benchmarks.grid RUN THREADS EXECUTOR``.

A round has messages, states, aggregation and metrics. The executor uses the cores of the process, whatever THREADS is.
"""

from __future__ import annotations

import sys

from benchmarks.rounds import Meter, context_from_arguments
from fedbn.federation.context import RunContext
from fedbn.federation.server import Outcome
from fedbn.nn.threads import torch_threads
from fedbn.stacked.executors import Executor, parse_executor
from fedbn.stacked.memory import collect_garbage_rarely, keep_freed_memory
from fedbn_clients.app import app as client_app
from fedbn_simulations.engines.grid import InProcessGrid
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.rounds import Listener, run_rounds


def rounds(ctx: RunContext, executor: Executor, meter: Meter) -> None:
    """Run the rounds of a run; the meter decides when each one starts."""

    def on_round(number: int, outcome: Outcome) -> None:
        meter.reply()
        meter.wait()

    grid = InProcessGrid(client_app, len(ctx.population.users), {"run": ctx.run.to_json()}, executor=executor)
    with torch_threads(1), task_identity(grid.run.run_id):
        meter.wait()
        run_rounds(grid, ctx.run, Listener(on_round=on_round))


if __name__ == "__main__":
    keep_freed_memory()
    collect_garbage_rarely()
    context, _ = context_from_arguments()
    rounds(context, parse_executor(sys.argv[3]), Meter())
