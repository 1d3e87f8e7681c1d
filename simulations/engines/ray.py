"""Flower's own Ray simulation on a private SuperLink (`simulations.flower.superlink`), and nothing left behind.

What the clients keep stays with them: Ray gives no access to it, and `Outcome.client_state` is empty. With a file to
    write to,
the server leaves a checkpoint in it after every round and the clients what they keep in a directory beside it, so that
the same run with the same file goes on where it was killed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from clients.persistence import STATES
from fedbn.errors import UserError
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome
from fedbn.federation.setup import build_context
from simulations.flower.processes import Family, private_place
from simulations.flower.superlink import SuperLink


def run_on_ray(run: Run, *, actors: int | None = None, address: str = "", out: Path | None = None) -> Outcome:
    """Execute one run, or what is left of it, in a session of its own.

    Args:
        run: what to do.
        actors: Ray workers that serve the clients; None for one a processor.
        address: of a Ray cluster that this machine is part of; empty: Ray is started for this run.
        out: where the server writes how far it has got; None: nowhere.

    Raises:
        UserError: Ray is not installed, or the run cannot work.
        FlowerRunError: the simulation failed.
    """
    states = None if out is None else out.resolve().with_name("states")
    with ray_session(actors, address, states) as execute:
        outcome = execute(run, out)
    if states is not None:
        shutil.rmtree(states, ignore_errors=True)
    return outcome


@contextmanager
def ray_session(
    actors: int | None = None, address: str = "", states: Path | None = None
) -> Iterator[Callable[..., Outcome]]:
    """A function that executes runs, one after the other, on one SuperLink that lives for this block.

    Args:
        actors: Ray workers that serve the clients; None for one a processor.
        address: of a Ray cluster that this machine is part of; empty: Ray is started for each run.
        states: directory for what clients keep; None: in memory.

    Raises:
        UserError: Ray is not installed.
        FlowerRunError: the SuperLink does not start.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("engine ray needs Ray: pip install 'fedbn[ray]', or use --engine grid (same numbers)")
    family = Family()
    with private_place(family.stop) as place:
        extra = {"RAY_ADDRESS": address} if address else {}
        extra |= {STATES: str(states)} if states else {}
        link = SuperLink(place, ("--simulation",), family=family, extra=extra)
        link.start()

        def execute(run: Run, out: Path | None = None) -> Outcome:
            users = len(build_context(run).population.users)
            own = None if address else min(actors or _processors(), users)
            return link.execute(run, "--federation-config", _federation(users, own, run.device), out=out)

        yield execute


def _federation(users: int, actors: int | None, device: str) -> str:
    """Flower's federation config: one SuperNode a user, and one processor an actor.

    Without a number of actors, those that a cluster has room for: whoever joins one may not say how large it is.

    >>> _federation(10, 2, "cpu").split()[:3]
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
        # Ray hides the devices from actors that ask for none, and rounds shares to four places.
        devices = torch.cuda.device_count()
        share = min(1.0, math.floor(10_000 * devices / actors) / 10_000)
        settings += [f"init-args-num-gpus={devices}", f"client-resources-num-gpus={share}"]
    return " ".join(settings)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
