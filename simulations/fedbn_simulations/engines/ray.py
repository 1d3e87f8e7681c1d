"""Flower's own Ray simulation on a private SuperLink (`fedbn_simulations.flower.superlink`), with complete cleanup.

Ray gives no access to client states, so `Outcome.client_states` is empty. With an output file, the server writes a
checkpoint to it after every round, and the clients write their states to a directory beside it, so that the same run
with the same file resumes after an interruption.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fedbn.federation.run import Run
from fedbn.federation.server import Outcome
from fedbn.federation.setup import build_context
from fedbn.stacked.executors import available_cores
from fedbn_clients.persistence import STATE_DIR_VARIABLE
from fedbn_simulations.flower.processes import ProcessGroup
from fedbn_simulations.flower.superlink import SuperLink
from fedbn_simulations.server.safeguards import SIMULATION_CONFIG

REPLY_SECONDS_ON_RAY = 12 * 3600.0
"""Seconds to wait for the replies in an exchange, in which few workers may run many clients."""


def run_on_ray(
    run: Run,
    *,
    actors: int | None = None,
    address: str = "",
    out: Path | None = None,
    sums: Sequence[str] = (),
) -> Outcome:
    """Execute one run, or the rest of it, in its own session.

    Args:
        run: run to execute.
        actors: number of Ray workers that run the clients; None: one per core.
        address: address of a Ray cluster that includes this machine; empty: Ray is started for this run.
        out: checkpoint file of the server; None: no checkpoints.
        sums: alignments and heads for which the seen clients send sums after training.

    Raises:
        FlowerRunError: the simulation failed.
    """
    state_dir = None if out is None else out.resolve().with_name("states")
    with ray_session(actors, address, state_dir) as execute:
        outcome = execute(run, out, sums)
    if state_dir is not None:
        shutil.rmtree(state_dir, ignore_errors=True)
    return outcome


@contextmanager
def ray_session(
    actors: int | None = None, address: str = "", state_dir: Path | None = None
) -> Iterator[Callable[..., Outcome]]:
    """Start a SuperLink for this context; yields a function that executes runs on it, one after the other.

    Args:
        actors: number of Ray workers that run the clients; None: one per core.
        address: address of a Ray cluster that includes this machine; empty: Ray is started for each run.
        state_dir: directory for client states; None: in memory.

    Raises:
        FlowerRunError: the SuperLink does not start.
    """
    processes = ProcessGroup()
    with processes.workspace() as directory:
        environment = {"RAY_ADDRESS": address} if address else {}
        environment |= {STATE_DIR_VARIABLE: str(state_dir)} if state_dir else {}
        link = SuperLink(directory, ("--simulation",), processes=processes, extra_environment=environment)
        link.timeout = REPLY_SECONDS_ON_RAY
        link.start()

        def execute(run: Run, out: Path | None = None, sums: Sequence[str] = ()) -> Outcome:
            users = len(build_context(run).population.users)
            num_actors = None if address else min(actors or available_cores(), users)
            federation = federation_config(users, num_actors, run.device)
            return link.execute(
                run, "--federation-config", federation, out=out, config={"sums": ",".join(sums), **SIMULATION_CONFIG}
            )

        yield execute


def federation_config(users: int, actors: int | None, device: str) -> str:
    """Flower's federation config with one SuperNode per user and one core per actor.

    Without a number of actors, the cluster decides: a program that joins a cluster cannot set its size.

    >>> federation_config(10, 2, "cpu").split()[:3]
    ['num-supernodes=10', 'client-resources-num-cpus=1', 'init-args-num-cpus=2']
    """
    settings = [
        f"num-supernodes={users}",
        "client-resources-num-cpus=1",
        *([] if actors is None else [f"init-args-num-cpus={actors}"]),
        'init-args-logging-level="ERROR"',
        "init-args-log-to-driver=false",
    ]
    if device.startswith("cuda") and actors is None:
        settings.append("client-resources-num-gpus=1.0")
    elif device.startswith("cuda") and actors is not None:
        # Ray hides GPUs from actors that do not request any, and rounds shares to four decimals.
        devices = torch.cuda.device_count()
        share = min(1.0, math.floor(10_000 * devices / actors) / 10_000)
        settings += [f"init-args-num-gpus={devices}", f"client-resources-num-gpus={share}"]
    return " ".join(settings)
