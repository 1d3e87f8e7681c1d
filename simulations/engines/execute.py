"""Three ways to execute a run; the numbers are the same to the last bit.

*reference*: the readable loop, without Flower. *grid*: Flower's apps over a Grid in this process. *ray*: Flower's
apps in Flower's own simulation; ``ray:HOST:PORT`` in a Ray cluster that is there already. ``grid:TIER`` says how the
grid does its clients' work (`fedbn.stacked.executors`): the tiers ``stacked``, ``lean`` and ``auto`` are faster and
equal to rounding, the last in a way that depends on timing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, RecordDict

from clients.app import app as client_app
from clients.records import arrays, set_threads, tensors
from fedbn.errors import UserError, unknown
from fedbn.federation.loop import federate
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome
from fedbn.federation.setup import build_context
from fedbn.stacked.executors import Executor, parse_executor
from simulations.app import app as server_app
from simulations.engines.grid import InProcessGrid
from simulations.flower.compat import task_identity
from simulations.server.optimizer import server_step
from simulations.server.rounds import Listener, listening

Engine = str
"""``reference``, ``grid``, ``grid:TIER``, ``ray`` or ``ray:ADDRESS``."""

ENGINES = ("reference", "grid", "ray")
OnRound = Callable[[int, Outcome], None]


def parse_engine(text: str) -> tuple[str, Executor]:
    """Engine and tier that a text names.

    Raises:
        UserError: there is none of this name.

    >>> parse_engine("grid:stacked")
    ('grid', 'stacked')
    """
    name, colon, executor = text.partition(":")
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES)
    if colon and name == "ray" and not re.fullmatch(r"auto|[\w.-]+:\d+", executor):
        raise UserError(f"engine {text!r}: a Ray cluster is addressed as ray:HOST:PORT, for instance ray:10.0.0.1:6379")
    if colon and name == "reference":
        raise UserError(f"engine {name!r} has no tiers; only the grid has: {text!r}")
    return name, parse_executor(executor) if colon and name == "grid" else "exact"


def execute(
    run: Run,
    engine: Engine = "grid",
    resume: Outcome | None = None,
    on_round: OnRound | None = None,
    checkpoint: Path | None = None,
) -> Outcome:
    """Execute a run, or the rest of one.

    Args:
        run: what to do.
        engine: how.
        resume: an unfinished outcome (reference and grid engines).
        on_round: told after each round, with all that is needed to go on from there (reference and grid engines).
        checkpoint: where a Ray run writes how far it has got, and goes on from.
    """
    set_threads()
    name, executor = parse_engine(engine)
    match name:
        case "reference":
            with task_identity(1):
                return federate(run, step=server_step(run.plan), resume=resume, on_round=on_round)
        case "grid":
            return _in_process(run, executor, resume, on_round)
        case _:
            from simulations.engines.ray import run_on_ray

            return run_on_ray(run, address=engine.partition(":")[2], out=checkpoint)


def _in_process(run: Run, executor: Executor, resume: Outcome | None, on_round: OnRound | None) -> Outcome:
    ctx = build_context(run)
    config = {"run": run.to_json()}
    grid = InProcessGrid(client_app, len(ctx.population.users), config, executor=executor)
    for user, client_state in (resume.client_states if resume else {}).items():
        grid.partition_context(max(user, 0)).state[f"client-state-{user}"] = arrays(client_state)
    finished: list[Outcome] = []

    def with_client_states(outcome: Outcome) -> Outcome:
        for context in grid.contexts.values():
            for name, record in context.state.array_records.items():
                outcome.client_states[int(name.removeprefix("client-state-"))] = tensors(record, run.device)
        outcome.client_states = dict(sorted(outcome.client_states.items()))
        return outcome

    listener = Listener(
        resume=resume,
        on_round=None if on_round is None else (lambda number, outcome: on_round(number, with_client_states(outcome))),
        on_end=lambda outcome: finished.append(with_client_states(outcome)),
    )
    with task_identity(grid.run.run_id), listening(listener):
        server_app(grid, _server_context(grid, config))
    return finished[0]


def _server_context(grid: InProcessGrid, config: dict[str, str]) -> Context:
    return Context(run_id=grid.run.run_id, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config))
