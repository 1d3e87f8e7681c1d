"""Three ways to execute a run; the numbers are the same to the last bit.

*reference*: the readable loop, without Flower. *grid*: Flower's apps over a Grid in this process. *ray*: Flower's
apps in Flower's own simulation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from flwr.app import Context, RecordDict

from clients.app import app as client_app
from clients.records import arrays, set_threads, tensors
from fedbn.federation import Outcome, federate
from fedbn.run import Run
from fedbn.setting import setting
from simulations.app import Listener, listening
from simulations.app import app as server_app
from simulations.flower_compat import task_identity
from simulations.grid import InProcessGrid
from simulations.server_optimizer import server_step

Engine = Literal["reference", "grid", "ray"]
OnRound = Callable[[int, Outcome], None]


def execute(
    run: Run, engine: Engine = "grid", resume: Outcome | None = None, on_round: OnRound | None = None
) -> Outcome:
    """Execute a run, or the rest of one.

    Args:
        run: what to do.
        engine: how.
        resume: an unfinished outcome (reference and grid engines; a Ray run starts anew).
        on_round: told after each round, with all that is needed to go on from there.
    """
    set_threads()
    match engine:
        case "reference":
            with task_identity(1):
                return federate(run, step=server_step(run.plan), resume=resume, on_round=on_round)
        case "grid":
            return _in_process(run, resume, on_round)
        case "ray":
            from simulations.ray_engine import run_on_ray

            return run_on_ray(run)


def _in_process(run: Run, resume: Outcome | None, on_round: OnRound | None) -> Outcome:
    here = setting(run)
    config = {"run": run.to_json()}
    grid = InProcessGrid(client_app, len(here.population.users), config)
    for user, kept in (resume.kept if resume else {}).items():
        grid.partition_context(max(user, 0)).state[f"kept-{user}"] = arrays(kept)
    finished: list[Outcome] = []

    def with_kept(outcome: Outcome) -> Outcome:
        for context in grid.contexts.values():
            for name, record in context.state.array_records.items():
                outcome.kept[int(name.removeprefix("kept-"))] = tensors(record, run.device)
        outcome.kept = dict(sorted(outcome.kept.items()))
        return outcome

    listener = Listener(
        resume=resume,
        on_round=None if on_round is None else (lambda number, outcome: on_round(number, with_kept(outcome))),
        on_end=lambda outcome: finished.append(with_kept(outcome)),
    )
    with task_identity(grid.run.run_id), listening(listener):
        server_app(grid, _server_context(grid, config))
    return finished[0]


def _server_context(grid: InProcessGrid, config: dict[str, str]) -> Context:
    return Context(run_id=grid.run.run_id, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config))
