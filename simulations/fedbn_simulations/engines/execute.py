"""Three engines to execute a run, with bit-identical results.

*reference*: the readable loop, without Flower. *grid*: the Flower apps over a Grid in this process. *ray*: the Flower
apps in Flower's own simulation, with ``ray:HOST:PORT`` in an existing Ray cluster. ``grid:EXECUTOR`` selects how the
grid runs its clients (`fedbn.stacked.executors`): ``stacked``, ``lean`` and ``auto`` are faster and equal up to
rounding; the rounding of ``auto`` depends on timing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from flwr.app import Context, RecordDict

from fedbn.errors import UserError, install_extra, unknown
from fedbn.federation.loop import federate
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome
from fedbn.federation.setup import build_context
from fedbn.objects import require_importable
from fedbn.stacked.executors import Executor, parse_executor
from fedbn_clients.app import app as client_app
from fedbn_clients.records import set_threads
from fedbn_simulations.app import app as server_app
from fedbn_simulations.engines.grid import InProcessGrid
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.optimizer import server_step
from fedbn_simulations.server.rounds import Listener, attach_listener
from fedbn_simulations.server.safeguards import SIMULATION_CONFIG

Engine = str
"""``reference``, ``grid``, ``grid:EXECUTOR``, ``ray`` or ``ray:ADDRESS``."""

ENGINES = ("reference", "grid", "ray")
OnRound = Callable[[int, Outcome], None]


def parse_engine(text: str) -> tuple[str, Executor]:
    """Parse the name of an engine and its executor.

    Raises:
        UserError: unknown name, or Ray is not installed.

    >>> parse_engine("grid:stacked")
    ('grid', 'stacked')
    """
    name, colon, executor = text.partition(":")
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES)
    if name == "ray" and find_spec("ray") is None:
        raise UserError(f"engine ray needs Ray: {install_extra('ray')}; or use --engine grid (same numbers)")
    if colon and name == "ray" and not re.fullmatch(r"auto|[\w.-]+:\d+", executor):
        raise UserError(f"engine {text!r}: a Ray cluster is addressed as ray:HOST:PORT, for example ray:10.0.0.1:6379")
    if colon and name == "reference":
        raise UserError(f"engine {name!r} has no executors, only the grid does: {text!r}")
    return name, parse_executor(executor) if colon and name == "grid" else "exact"


def check_engine(text: str, runs: Iterable[Run]) -> None:
    """Check the name of an engine, and that it can execute runs with these objects.

    Raises:
        UserError: as `parse_engine`, or Ray would have to import an object that only this process has.
    """
    if parse_engine(text)[0] == "ray":
        require_importable("engine ray", *(run.to_json() for run in runs))


def execute(
    run: Run,
    engine: Engine = "grid",
    resume: Outcome | None = None,
    on_round: OnRound | None = None,
    checkpoint: Path | None = None,
    *,
    deployed: bool = False,
    sums: Sequence[str] = (),
) -> Outcome:
    """Execute a run, or the rest of one.

    Args:
        run: run to execute.
        engine: name of the engine.
        resume: partial outcome from which the run continues (reference and grid engines).
        on_round: called after each round with an outcome from which the run can resume (reference and grid engines).
        checkpoint: file for checkpoints, from which the run resumes (Ray engine).
        deployed: apply the safeguards of deployments (`fedbn_simulations.server.safeguards`) on the grid.
        sums: alignments and heads for which the seen clients send sums after training (`fedbn.online.sums`).
    """
    set_threads()
    check_engine(engine, [run])
    name, executor = parse_engine(engine)
    match name:
        case "reference":
            with task_identity(1):
                return federate(run, step=server_step(run.plan), resume=resume, on_round=on_round, sums=sums)
        case "grid":
            return _in_process(run, executor, resume, on_round, deployed=deployed, sums=sums)
        case _:
            from fedbn_simulations.engines.ray import run_on_ray

            return run_on_ray(run, address=engine.partition(":")[2], out=checkpoint, sums=sums)


def _in_process(
    run: Run,
    executor: Executor,
    resume: Outcome | None,
    on_round: OnRound | None,
    *,
    deployed: bool,
    sums: Sequence[str],
) -> Outcome:
    ctx = build_context(run)
    config = {"run": run.to_json(), "sums": ",".join(sums)} | ({} if deployed else SIMULATION_CONFIG)
    grid = InProcessGrid(client_app, len(ctx.population.users), config, executor=executor)
    if resume:
        grid.set_client_states(resume.client_states, run.device)
    finished: list[Outcome] = []
    earlier = dict(resume.phases) if resume else {}

    def completed(outcome: Outcome) -> Outcome:
        outcome.client_states = grid.client_states()
        for kind, how in grid.execution.items():
            outcome.execution[kind] = list(dict.fromkeys([*outcome.execution.get(kind, []), *how]))
        for phase, seconds in grid.phases.items():
            outcome.phases[phase] = earlier.get(phase, 0.0) + seconds
        return outcome

    listener = Listener(
        resume=resume,
        on_round=None if on_round is None else (lambda number, outcome: on_round(number, completed(outcome))),
        on_end=lambda outcome: finished.append(completed(outcome)),
    )
    with task_identity(grid.run.run_id), attach_listener(listener):
        server_app(grid, Context(grid.run.run_id, 1, {}, RecordDict(), dict(grid.run_config)))
    return finished[0]
