"""A run in Flower's deployment engine on this machine: a SuperLink, one SuperNode a user, real processes over HTTP.

The apps are those of every other engine, so that the outcome is compared with the in-process grid's to the last bit.
Every message starts a process that imports PyTorch; that is Flower's way, and it is what takes the time.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fedbn.errors import UserError
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome, Server
from fedbn.federation.setup import build_context
from fedbn.nn.roles import State
from simulations.engines.execute import execute
from simulations.flower.certificates import make_certificates
from simulations.flower.processes import HOST, POLL_SECONDS, Family, free_port, private_place, script
from simulations.flower.superlink import LINK, FlowerRunError, SuperLink
from simulations.storage.checkpoint import load_latest

MOST_NODES = 16
"""More SuperNodes than this on one machine mostly wait for each other; simulations are for that."""

ONLINE_SECONDS = 180.0
CHECKPOINT = "outcome.safetensors"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Deployment:
    """What a deployed run came to, beside the same run in this process.

    Attributes:
        deployed: outcome of the SuperLink's run.
        in_process: outcome of the grid in this process.
        users: SuperNodes that served.
        tls: whether they spoke TLS and proved who they are.
        seconds: of starting the processes, of the deployed run and of the run in this process.
        differences: what is not equal to the last bit, in words.
    """

    deployed: Outcome
    in_process: Outcome
    users: int
    tls: bool
    seconds: dict[str, float]
    differences: tuple[str, ...]


def deploy(run: Run, *, tls: bool = False, say: Say = lambda text: None, out: Path | None = None) -> Deployment:
    """Execute a run on a SuperLink with one SuperNode a user, and in this process, and compare.

    Args:
        run: what to do.
        tls: encrypt, and let only registered nodes in.
        say: told of each step.
        out: directory in which the server and the nodes keep how far they have got; a run that was killed goes on
            from there. None: nothing is kept.

    Raises:
        UserError: the run cannot work, or has too many users.
        FlowerRunError: a process ended, or the run failed.
    """
    users = len(build_context(run).population.users)
    began = time.perf_counter()
    checkpoint = None if out is None else out / CHECKPOINT
    if checkpoint is not None and (begun := load_latest(checkpoint, run)):
        say(f"{out} holds {len(begun.curve)} of {run.plan.rounds} rounds; going on")
    with deployment(users, tls=tls, say=say, states=None if out is None else out.resolve() / "states") as link:
        ready = time.perf_counter()
        say(f"{users} SuperNodes are online after {ready - began:.1f} s")
        deployed = link.execute(run, out=checkpoint)
        done = time.perf_counter()
        say(f"the run took {done - ready:.1f} s; stopping")
    stopped = time.perf_counter()
    in_process = execute(run, "grid")
    seconds = {"start": ready - began, "run": done - ready, "grid": time.perf_counter() - stopped}
    return Deployment(deployed, in_process, users, tls, seconds, differences(deployed, in_process))


@contextmanager
def deployment(
    users: int,
    *,
    tls: bool = False,
    say: Say = lambda text: None,
    states: Path | None = None,
    data: Sequence[Path] | None = None,
) -> Iterator[SuperLink]:
    """A SuperLink with SuperNodes that are online, all of them gone at the end of this block.

    Args:
        users: how many nodes; node ``i`` has partition id ``i``.
        tls: encrypt, and let only registered nodes in.
        say: told of each step.
        states: where the nodes keep what their users keep; None: in a directory that goes with this block.
        data: the file of each node's user, for the scenario ``remote``; None: nodes load their scenario.

    Raises:
        UserError: too many nodes for one machine.
        FlowerRunError: a process ended, or a node does not come online.
    """
    if users > MOST_NODES:
        raise UserError(
            f"{users} users would need as many SuperNodes, at most {MOST_NODES} are started on one machine: choose "
            "fewer, for instance digits8:users=3:unseen=1, or simulate with fedbn compare --engine ray"
        )
    family = Family()
    with private_place(family.stop) as place:
        certificates = make_certificates(place / "certificates") if tls else None
        options = ("--enable-supernode-auth",) if tls else ()
        link = SuperLink(place, options, certificates, family)
        link.start()
        say(f"SuperLink on {HOST}:{link.port}" + (" with TLS and node authentication" if tls else ", in the clear"))
        for user in range(users):
            start_node(link, user, users, states, data[user] if data else None)
        await_nodes(link, users)
        yield link


def start_node(link: SuperLink, user: int, users: int, states: Path | None = None, data: Path | None = None) -> None:
    """Start the SuperNode of one user, which keeps what its user keeps on disk, and may have data of its own there."""
    command = [script("flower-supernode"), "--superlink", f"{HOST}:{link.port}"]
    command += ["--host", HOST, "--port", str(free_port())]
    # JSON's strings are TOML's, which is how Flower reads this.
    config = f"partition-id={user} num-partitions={users} state-dir={json.dumps(str(states or link.place / 'states'))}"
    command += ["--node-config", config + (f" data={json.dumps(str(data))}" if data else "")]
    if link.certificates:
        key = link.certificates.node_key(user)
        link.flwr("supernode", "register", str(key.with_suffix(".pub")), LINK)
        command += ["--root-certificates", str(link.certificates.root), *link.certificates.options()]
        command += ["--auth-supernode-private-key", str(key)]
    else:
        command.append("--insecure")
    link.begin(f"supernode-{user}", command)


def await_nodes(link: SuperLink, users: int) -> None:
    """Wait until so many nodes are online, and none that is gone is still taken for online.

    Raises:
        FlowerRunError: a process ended, or they do not come online in time.
    """
    deadline = time.monotonic() + ONLINE_SECONDS
    # A run that finds some of the nodes only would ask the others in a round of messages of its own.
    while (online := _online(link)) != users:
        link.check()
        if time.monotonic() > deadline:
            raise FlowerRunError(f"{online} of {users} SuperNodes came online\n{link.tail('supernode-0')}")
        time.sleep(POLL_SECONDS)


def _online(link: SuperLink) -> int:
    return sum(node["status"] == "online" for node in link.flwr("supernode", "list", LINK)["nodes"])


def differences(a: Outcome, b: Outcome) -> tuple[str, ...]:
    """What two outcomes of a run differ in, bit by bit; times and what clients keep for themselves apart."""
    parts = [(f"server's {f.name}", getattr(a.server, f.name), getattr(b.server, f.name)) for f in fields(Server)]
    parts += [("training curve", a.curve, b.curve), ("scores", a.scores, b.scores)]
    return tuple(name for name, one, other in parts if not _same(one, other))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    return bool(a == b)


def digest(state: State) -> str:
    """Sixteen hexadecimal digits of a state's names, types and bits.

    >>> digest({"w": torch.zeros(2)}) == digest({"w": torch.zeros(3)})
    False
    """
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
