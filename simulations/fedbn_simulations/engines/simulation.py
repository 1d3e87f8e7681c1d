"""Simulation of any Flower app in this process, without Ray.

`run_simulation` has the signature of Flower's function. It runs the ServerApp in the calling thread and the ClientApp
with one of three backends: ``serial`` (one call at a time, in this process), ``threads`` and ``processes``. As in
Flower, messages are sent without waiting, and a server waits for replies as long as it wants. `send_and_receive`
returns the replies in the order of the messages, so the results of a deterministic app can be repeated bit for bit.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import ServerApp

from fedbn.errors import UserError, unknown
from fedbn.seeds import key
from fedbn.stacked.executors import available_cores
from fedbn_simulations.engines.grid import FIRST_NODE, InProcessGrid
from fedbn_simulations.engines.waiting import NodeWait, former_servers_do_not_wait
from fedbn_simulations.engines.workers import (
    Caller,
    ClientCallable,
    ClientCallError,
    InProcessCaller,
    ProcessCaller,
    seeded,
)
from fedbn_simulations.flower.apps import FlowerApp
from fedbn_simulations.flower.compat import (
    CLIENT_APP_RAISED,
    NODE_UNAVAILABLE,
    SERVER_NODE_ID,
    copy_records,
    exit_after_failure,
    set_message_id,
    task_identity,
    with_content,
)

Backend = Literal["serial", "threads", "processes"]
ServerCallable = Callable[..., None]
OnReply = Callable[[Message, Message], None]

log = logging.getLogger("flwr")

RUN_ID = 1

DEFAULT_SUPERNODES = 2
"""Flower's default number of simulated nodes."""


@dataclass(frozen=True)
class Workers:
    """How the ClientApp is called.

    Attributes:
        backend: ``serial``, ``threads`` or ``processes``.
        number: number of threads or processes; None: one per core.
        client_timeout: seconds after which a client counts as failed; None: no limit.

    Raises:
        UserError: a value is out of bounds.
    """

    backend: Backend = "serial"
    number: int | None = None
    client_timeout: float | None = None

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            hint = "; for Ray, use flwr.simulation.run_simulation" if self.backend == "ray" else ""
            raise UserError(f"{unknown('backend', self.backend, get_args(Backend))}{hint}")
        if self.backend == "serial" and self.number not in (None, 1):
            raise UserError("backend serial has one worker: use backend threads or processes")
        if self.number is not None and self.number < 1:
            raise UserError(f"the number of workers must be at least 1, not {self.number}")
        if self.client_timeout is not None and not self.client_timeout > 0:
            raise UserError(f"the client timeout must be positive, not {self.client_timeout:g}")

    @classmethod
    def from_config(cls, backend: str, config: dict[str, Any] | None) -> Workers:
        """Read Flower's ``backend_config``.

        Args:
            backend: name of the backend.
            config: ``num_workers`` and ``client_timeout``; of Flower's own keys, ``num_cpus`` in ``init_args`` and
                ``client_resources`` define the number of workers, and others have no meaning without Ray.

        Raises:
            UserError: an unknown key.

        >>> flower = {"init_args": {"num_cpus": 8}, "client_resources": {"num_cpus": 2, "num_gpus": 0.0}}
        >>> Workers.from_config("threads", flower)
        Workers(backend='threads', number=4, client_timeout=None)
        """
        config = {name.replace("-", "_"): value for name, value in (config or {}).items()}
        known = ("num_workers", "client_timeout", "init_args", "client_resources", "actor")
        for name in config:
            if name not in known:
                raise unknown("key of backend_config", name, known)
        number = config.get("num_workers")
        cpus = config.get("init_args", {}).get("num_cpus")
        if number is None and cpus is not None and backend != "serial":
            number = max(1, int(cpus // config.get("client_resources", {}).get("num_cpus", 1)))
        return cls(cast(Backend, backend), number, config.get("client_timeout"))

    def callers(self, app: ClientCallable, clients: int) -> list[Caller]:
        """One caller per worker, at most one per client."""
        if self.backend == "serial":
            return [InProcessCaller(app, self.client_timeout)]
        number = min(self.number or available_cores(), clients)
        if self.backend == "threads":
            return [InProcessCaller(app, self.client_timeout) for _ in range(number)]
        threads = max(1, available_cores() // number)
        return [ProcessCaller(app, self.client_timeout, threads) for _ in range(number)]


class SimulationGrid(InProcessGrid):
    """A grid for any app: calls are asynchronous, servers may use it from several threads, clients may fail.

    The messages to a node are answered one after the other, in the order in which they were sent.
    """

    def __init__(
        self,
        client_app: ClientCallable,
        nodes: int,
        run_config: dict[str, Any],
        workers: Workers | None = None,
        *,
        run_id: int = RUN_ID,
        seed: int | None = None,
        on_reply: OnReply = lambda message, reply: None,
    ) -> None:
        """Create a grid and start its workers; `close` stops them.

        Args:
            client_app: app that handles the messages.
            nodes: number of nodes.
            run_config: run-config, copied to every context.
            workers: how the app is called.
            run_id: Flower's run id.
            seed: global random numbers of a call are keyed by this seed, the partition, the type of the message and
                the number of such messages before, so that training does not depend on how often a client evaluates;
                None: they are not seeded.
            on_reply: called with each message and its reply.
        """
        super().__init__(cast(Any, client_app), nodes, run_config, run_id=run_id)
        self._seed, self._on_reply, self._wait = seed, on_reply, NodeWait(nodes)
        self._changed, self._closed = threading.Condition(), False
        self._failure: Exception | None = None
        self._ready: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._waiting: dict[int, deque[Message]] = defaultdict(deque)
        self._calls: dict[tuple[int, str], int] = defaultdict(int)
        self._callers = (workers or Workers()).callers(client_app, nodes)
        for caller in self._callers:
            threading.Thread(target=self._work, args=(caller,), daemon=True).start()

    def get_node_ids(self) -> Iterable[int]:
        """Node ids, in the order of the partitions.

        Raises:
            UserError: the server waits for more nodes.
        """
        self._wait.ask()
        return super().get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages to the workers without waiting."""
        self._wait.reset()
        ids = []
        with self._changed:
            for message in messages:
                set_message_id(message, self._next_id())
                ids.append(message.metadata.message_id)
                node = message.metadata.dst_node_id
                if not 0 <= node - FIRST_NODE < self.nodes:
                    self._store(message, Message(Error(NODE_UNAVAILABLE, "no such node"), reply_to=message))
                    continue
                self._waiting[node].append(message)
                if len(self._waiting[node]) == 1:
                    self._ready.put(node)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return and remove the replies that have arrived, in the order of the ids."""
        self._wait.reset()
        with self._changed:
            self.raise_failure()
            return super().pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for the replies, at most ``timeout`` seconds; replies are in the order of messages."""
        ids = list(self.push_messages(messages))
        with self._changed:
            self._changed.wait_for(lambda: self._failure or all(i in self._replies for i in ids), timeout)
        return self.pull_messages(ids)

    def raise_failure(self) -> None:
        """Raise the exception that ended a worker, such as one of ``on_reply``."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Stop the workers; messages without a reply are dropped, and threads of the server that wait for one end."""
        with self._changed:
            self._closed = True
            self._failure = self._failure or RuntimeError("the simulation has ended")
            self._changed.notify_all()
        for _ in self._callers:
            self._ready.put(None)
        for caller in self._callers:
            caller.close()

    def _work(self, caller: Caller) -> None:
        try:
            self._answer(caller)
        except Exception as error:  # without this worker, the server would wait forever
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _answer(self, caller: Caller) -> None:
        """Answer the messages of one node after the other."""
        while (node := self._ready.get()) is not None and not self._closed:
            message = self._waiting[node][0]
            reply = self._call(caller, node, message)
            with self._changed:
                self._store(message, reply)
                self._waiting[node].popleft()
                if self._waiting[node]:
                    self._ready.put(node)

    def _store(self, message: Message, reply: Message) -> None:
        set_message_id(reply, self._next_id())
        self._on_reply(message, reply)
        self._replies[message.metadata.message_id] = reply
        self._changed.notify_all()

    def _call(self, caller: Caller, node: int, message: Message) -> Message:
        """The reply to a message; a failed call leaves the state of the node as it was."""
        stored = self.context(node)
        config, state = dict(stored.run_config), copy_records(stored.state)
        context = Context(stored.run_id, node, dict(stored.node_config), state, config)
        kind = message.metadata.message_type
        number = self._calls[node, kind]
        self._calls[node, kind] += 1
        seed = None if self._seed is None else key(self._seed, "client", node - FIRST_NODE, kind, number)
        try:
            reply, self.contexts[node] = caller(with_content(message, copy_records(message.content)), context, seed)
            return reply
        except ClientCallError as error:
            log.error("ClientApp of node %s failed: %s", node, error.details or error)
            return Message(Error(CLIENT_APP_RAISED, str(error)), reply_to=message)


def run_simulation(
    server_app: ServerApp | ServerCallable,
    client_app: ClientCallable,
    num_supernodes: int,
    backend_name: str = "serial",
    backend_config: dict[str, Any] | None = None,
    enable_tf_gpu_growth: bool = False,
    verbose_logging: bool = False,
    *,
    run_config: dict[str, Any] | None = None,
    seed: int | None = None,
    on_reply: OnReply = lambda message, reply: None,
) -> Context:
    """Run a Flower app in this process, without Ray; the first seven parameters are those of Flower's function.

    With backend ``serial``, an app that seeds its random numbers, or ``seed``, gives the same bits every time. They are
    also the bits of Flower's Ray simulation, if the app seeds its random numbers in every call, PyTorch uses the same
    number of threads, and the server aggregates in a fixed order; Flower's strategies aggregate in the order of the
    replies, which is random on Ray, so that results are equal up to the order of summation.

    Args:
        server_app: ServerApp; an exception that it raises is passed on.
        client_app: ClientApp; an exception that it raises is logged and becomes an error reply.
        num_supernodes: number of nodes.
        backend_name: ``serial``, ``threads`` or ``processes``. Threads share the global random number generators.
        backend_config: ``{"num_workers": 4, "client_timeout": 60}``; see `Workers.from_config`.
        enable_tf_gpu_growth: set ``TF_FORCE_GPU_ALLOW_GROWTH``.
        verbose_logging: also show messages of level DEBUG.
        run_config: run-config of the app, which Flower's function does not have.
        seed: key the global random numbers of Python, NumPy and PyTorch by this seed: those of the server, and those
            of each client by partition, type of the message and number of such messages before.
        on_reply: called with each message and its reply.

    Returns:
        The context of the server.

    Raises:
        UserError: an unknown backend or option, fewer than one node, a seed with threads, or a server that waits for
            more nodes.

    >>> from flwr.app import Message
    >>> from flwr.clientapp import ClientApp
    >>> server, client = ServerApp(), ClientApp()
    >>> @client.query()
    ... def double(message, context):
    ...     message.content["config"]["x"] *= context.run_config["factor"]
    ...     return Message(message.content, reply_to=message)
    >>> @server.main()
    ... def main(grid, context):
    ...     record = RecordDict({"config": ConfigRecord({"x": 21})})
    ...     replies = grid.send_and_receive([Message(record, n, "query") for n in grid.get_node_ids()])
    ...     print([reply.content["config"]["x"] for reply in replies])
    >>> from flwr.app import ConfigRecord
    >>> context = run_simulation(server, client, 3, run_config={"factor": 2})
    [42, 42, 42]
    """
    workers = Workers.from_config(backend_name, backend_config)
    if num_supernodes < 1:
        raise UserError(f"the number of SuperNodes must be at least 1, not {num_supernodes}")
    if seed is not None and workers.backend == "threads":
        raise UserError("threads share the random numbers of a process: use backend serial or processes with a seed")
    if enable_tf_gpu_growth:
        os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
    if verbose_logging:
        show_debug_messages()
    config = dict(run_config or {})
    grid = SimulationGrid(client_app, num_supernodes, config, workers, seed=seed, on_reply=on_reply)
    context = Context(RUN_ID, SERVER_NODE_ID, {}, RecordDict(), config)
    try:
        with (
            task_identity(RUN_ID),
            seeded(None if seed is None else key(seed, "server")),
            former_servers_do_not_wait(num_supernodes),
        ):
            server_app(grid=grid, context=context)
            grid.raise_failure()  # servers of the former interface ignore it
    finally:
        grid.close()
    return context


def run_app(
    app: FlowerApp,
    num_supernodes: int | None = None,
    run_config: Sequence[str] = (),
    backend: str = "serial",
    backend_config: dict[str, Any] | None = None,
    seed: int | None = None,
) -> Context:
    """Run the app of a directory with the messages and exit codes of Flower's simulation process.

    Args:
        app: the app.
        num_supernodes: number of nodes; None: that of the app's default federation, else 2 as in Flower.
        run_config: overrides of the run-config (`fedbn_simulations.flower.apps.parse_overrides`).
        backend: see `run_simulation`.
        backend_config: see `run_simulation`.
        seed: see `run_simulation`.

    Raises:
        UserError: the app or an option is not valid.
        SystemExit: with code 1, if the app raises an exception.
    """
    config = app.run_config(run_config)
    nodes = num_supernodes or app.num_supernodes or DEFAULT_SUPERNODES
    if backend == "processes" and app.hidden_packages:
        raise UserError(
            f"the app's package {app.hidden_packages[0]} has the name of one of this project, so worker processes "
            "would import the wrong one: use backend serial or threads"
        )
    log.info("Starting Flower Simulation")
    log.info("App `%s` (%s simulated SuperNodes)", app.name, nodes)
    with failures_end_like_flower(), app.loaded() as (server_app, client_app):
        return run_simulation(server_app, client_app, nodes, backend, backend_config, run_config=config, seed=seed)


@contextmanager
def failures_end_like_flower() -> Iterator[None]:
    """Log an exception of an app, and exit with the code of Flower's simulation process.

    Raises:
        UserError: raised in this context.
        SystemExit: with code 1, if the app raises another exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        log.error("Simulation raised an exception", exc_info=error)
        exit_after_failure(error)


def show_debug_messages() -> None:
    """Show Flower's messages of level DEBUG."""
    for handler in log.handlers:
        handler.setLevel(logging.DEBUG)
