"""Flower's own Ray simulation on a private SuperLink (`simulations.superlink`), and nothing left behind.

What the clients keep stays with them: Ray gives no access to it, and `Outcome.kept` is empty.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fedbn.errors import UserError
from fedbn.federation import Outcome
from fedbn.run import Run
from fedbn.setting import setting
from simulations.processes import Family, private_place
from simulations.superlink import SuperLink


def run_on_ray(run: Run, *, actors: int | None = None) -> Outcome:
    """Execute one run in a session of its own.

    Args:
        run: what to do.
        actors: Ray workers that serve the clients; None for one a processor.

    Raises:
        UserError: Ray is not installed, or the run cannot work.
        FlowerRunError: the simulation failed.
    """
    with ray_session(actors) as execute:
        return execute(run)


@contextmanager
def ray_session(actors: int | None = None) -> Iterator[Callable[[Run], Outcome]]:
    """A function that executes runs, one after the other, on one SuperLink that lives for this block.

    Raises:
        UserError: Ray is not installed.
        FlowerRunError: the SuperLink does not start.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("engine ray needs Ray: pip install 'fedbn[ray]', or use --engine grid (same numbers)")
    family = Family()
    with private_place(family.stop) as place:
        link = SuperLink(place, ("--simulation",), family=family)
        link.start()

        def execute(run: Run) -> Outcome:
            users = len(setting(run).population.users)
            federation = _federation(users, min(actors or _processors(), users), run.device)
            return link.execute(run, "--federation-config", federation)

        yield execute


def _federation(users: int, actors: int, device: str) -> str:
    """Flower's federation config: one SuperNode a user, and one processor an actor.

    >>> _federation(10, 2, "cpu").split()[:3]
    ['num-supernodes=10', 'client-resources-num-cpus=1', 'init-args-num-cpus=2']
    """
    settings = [
        f"num-supernodes={users}",
        "client-resources-num-cpus=1",
        f"init-args-num-cpus={actors}",
        'init-args-logging-level="ERROR"',
        "init-args-log-to-driver=false",
    ]
    if device.startswith("cuda"):
        # Ray hides the devices from actors that ask for none, and rounds shares to four places.
        devices = torch.cuda.device_count()
        share = min(1.0, math.floor(10_000 * devices / actors) / 10_000)
        settings += [f"init-args-num-gpus={devices}", f"client-resources-num-gpus={share}"]
    return " ".join(settings)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
