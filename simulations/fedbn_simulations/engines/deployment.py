"""Flower's deployment engine on this machine: a SuperLink and one SuperNode process per user, connected over HTTP.

The apps are those of all other engines, so the outcome is compared bit by bit with that of the in-process grid. Flower
starts a process that imports PyTorch for every message, which accounts for most of the time.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fedbn.errors import UserError
from fedbn.federation.failures import CLIENT_LOG, client_log
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome, Server
from fedbn.federation.setup import build_context
from fedbn.files import locked
from fedbn.nn.roles import State
from fedbn.objects import require_importable
from fedbn_simulations.engines.execute import execute
from fedbn_simulations.flower.certificates import make_certificates
from fedbn_simulations.flower.processes import HOST, POLL_SECONDS, ProcessGroup, free_port, script_path
from fedbn_simulations.flower.superlink import SUPERLINK_NAME, FlowerRunError, SuperLink
from fedbn_simulations.server.keys import read_keys
from fedbn_simulations.server.safeguards import DEPLOYMENT_CONFIG
from fedbn_simulations.storage.checkpoint import load_latest

MAX_NODES = 16
"""Maximum number of SuperNodes on one machine; more would mostly wait for each other."""

ONLINE_SECONDS = 180.0
CHECKPOINT = "outcome.safetensors"

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Deployment:
    """Outcome of a deployed run and of the same run in this process.

    Attributes:
        deployed: outcome of the run on the SuperLink.
        in_process: outcome of the run on the in-process grid.
        users: number of SuperNodes.
        tls: whether TLS and node authentication were used.
        seconds: duration of the start of the processes, of the deployed run and of the in-process run.
        differences: parts of the outcomes that are not bit-identical.
    """

    deployed: Outcome
    in_process: Outcome
    users: int
    tls: bool
    seconds: dict[str, float]
    differences: tuple[str, ...]


def deploy(
    run: Run,
    *,
    tls: bool = False,
    notify: Notify = lambda text: None,
    out: Path | None = None,
    keys: Path | None = None,
    sums: Sequence[str] = (),
) -> Deployment:
    """Execute a run on a SuperLink with one SuperNode per user and in this process, and compare the outcomes.

    Args:
        run: run to execute.
        tls: use TLS, admit only registered nodes, and bind each user to the key of its node.
        notify: called with a message at each step.
        out: directory for checkpoints and client states, from which an interrupted run resumes; None: not stored.
        keys: TOML file with the public key of each user's node, with the keys beside it as ``node0``, ``node1`` and so
            on; both are created if they do not exist. None: temporary keys. Requires ``tls``.
        sums: alignments and heads for which the seen clients send sums after training.

    Raises:
        UserError: the run has invalid settings or too many users.
        ClientError: a client failed; the message names the clients' log, in ``out`` or a temporary directory.
        FlowerRunError: a process exited, or the run failed.
    """
    if keys is not None and not tls:
        raise UserError("--users binds users to keys of nodes, which only --tls checks: add --tls")
    require_importable("a deployment", run.to_json())
    ctx = build_context(run)
    users = len(ctx.population.users)
    for notice in ctx.notices:
        notify(f"Note: {notice}")
    with ExitStack() as stack:
        if out is not None:
            stack.enter_context(locked(out))
            if partial := load_latest(out / CHECKPOINT, run):
                notify(f"{out} holds {len(partial.curve)} of {run.plan.rounds} rounds; resuming")
        start = time.perf_counter()
        states = None if out is None else out.resolve() / "states"
        temporary_log = Path(tempfile.gettempdir(), f"fedbn-{uuid.uuid4().hex}-{CLIENT_LOG}")
        stack.enter_context(client_log(temporary_log if out is None else out / CLIENT_LOG))
        with deployment(users, tls=tls, notify=notify, state_dir=states, keys=keys) as link:
            ready = time.perf_counter()
            notify(f"{users} SuperNodes are online after {ready - start:.1f} s")
            checkpoint = None if out is None else out / CHECKPOINT
            config = {"sums": ",".join(sums), **DEPLOYMENT_CONFIG}
            deployed = link.execute(run, out=checkpoint, config=config)
            done = time.perf_counter()
            notify(f"the run took {done - ready:.1f} s; stopping")
    stopped = time.perf_counter()
    in_process = execute(run, "grid", deployed=True, sums=sums)
    seconds = {"start": ready - start, "run": done - ready, "grid": time.perf_counter() - stopped}
    return Deployment(deployed, in_process, users, tls, seconds, differences(deployed, in_process))


@contextmanager
def deployment(
    users: int,
    *,
    tls: bool = False,
    notify: Notify = lambda text: None,
    state_dir: Path | None = None,
    data: Sequence[Path] | None = None,
    keys: Path | None = None,
) -> Iterator[SuperLink]:
    """Start a SuperLink and SuperNodes, and stop them at the end of the context.

    Args:
        users: number of nodes; node ``i`` has partition id ``i``.
        tls: use TLS, admit only registered nodes, and bind each user to the key of its node.
        notify: called with a message at each step.
        state_dir: directory for client states; None: a temporary directory.
        data: data file of each node, for the scenario ``remote``; None: nodes load their scenario.
        keys: TOML file with the public key of each user's node, as in `deploy`.

    Raises:
        UserError: too many nodes for one machine.
        FlowerRunError: a process exited, or a node does not come online.
    """
    if users > MAX_NODES:
        raise UserError(
            f"{users} users need {users} SuperNodes, but at most {MAX_NODES} can run on one machine: use fewer users, "
            "for example digits8:users=3:unseen=1, or simulate with fedbn compare --engine ray"
        )
    processes = ProcessGroup()
    with processes.workspace() as directory:
        certificates = make_certificates(directory / "certificates", keys) if tls else None
        if certificates:
            certificates.bind_users(users)
            read_keys(certificates.users, users)
        options = ("--enable-supernode-auth",) if tls else ()
        link = SuperLink(directory, options, certificates, processes)
        link.start()
        how = " with TLS, node authentication and users bound to keys" if tls else ", without TLS"
        notify(f"SuperLink on {HOST}:{link.port}{how}")
        for user in range(users):
            start_node(link, user, users, state_dir, data[user] if data else None)
        await_nodes(link, users)
        yield link


def start_node(link: SuperLink, user: int, users: int, state_dir: Path | None = None, data: Path | None = None) -> None:
    """Start the SuperNode of one user, with its client state and optionally its data on disk."""
    command = [script_path("flower-supernode"), "--superlink", f"{HOST}:{link.port}"]
    command += ["--host", HOST, "--port", str(free_port())]
    # Flower parses this as TOML, whose strings are compatible with JSON.
    state_dir = state_dir or link.directory / "states"
    config = f"partition-id={user} num-partitions={users} state-dir={json.dumps(str(state_dir))}"
    command += ["--node-config", config + (f" data={json.dumps(str(data))}" if data else "")]
    if link.certificates:
        key = link.certificates.node_key(user)
        link.flwr("supernode", "register", str(key.with_suffix(".pub")), SUPERLINK_NAME)
        command += ["--root-certificates", str(link.certificates.root), *link.certificates.options()]
        command += ["--auth-supernode-private-key", str(key)]
    else:
        command.append("--insecure")
    link.start_process(f"supernode-{user}", command)


def await_nodes(link: SuperLink, users: int) -> None:
    """Wait until exactly ``users`` nodes are online.

    Raises:
        FlowerRunError: a process exited, or the nodes do not come online in time.
    """
    deadline = time.monotonic() + ONLINE_SECONDS
    # A run that starts with fewer nodes would query the others in an extra round of messages.
    while (online := _online(link)) != users:
        link.check()
        if time.monotonic() > deadline:
            raise FlowerRunError(f"{online} of {users} SuperNodes came online\n{link.tail('supernode-0')}")
        time.sleep(POLL_SECONDS)


def _online(link: SuperLink) -> int:
    return sum(node["status"] == "online" for node in link.flwr("supernode", "list", SUPERLINK_NAME)["nodes"])


def differences(a: Outcome, b: Outcome) -> tuple[str, ...]:
    """Parts in which two outcomes of a run are not bit-identical, except durations and client states."""
    parts = [(f"server's {f.name}", getattr(a.server, f.name), getattr(b.server, f.name)) for f in fields(Server)]
    parts += [("training curve", a.curve, b.curve), ("scores", a.scores, b.scores), ("labeled sums", a.sums, b.sums)]
    return tuple(name for name, first, second in parts if not _same(first, second))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    return bool(a == b)


def digest(state: State) -> str:
    """Digest of the names, dtypes, shapes and values of a state, 16 hexadecimal digits.

    >>> digest({"w": torch.zeros(2)}) == digest({"w": torch.zeros(3)})
    False
    """
    hasher = hashlib.sha256()
    for name, value in sorted(state.items()):
        hasher.update(f"{name} {value.dtype} {list(value.shape)}".encode() + value.cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]
