"""The default engine: a Flower Grid in this process, running the same apps without Ray.

Node ``p`` has partition id ``p`` and its own `Context`, whose state lives as long as the grid. Messages carry the same
records as over the network; containers are copied, so that clients do not see each other's changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedbn.federation.client_table import ClientTable
from fedbn.nn.roles import State
from fedbn.stacked.cohort import CohortRound
from fedbn.stacked.executors import MAX_STACK_WIDTH, ClientExecutor, Execution, Executor
from fedbn.strategies.base import Progress, StackedUpdates
from fedbn_clients.app import app, train_cohort
from fedbn_clients.errors import report_errors
from fedbn_clients.jobs import run_batched
from fedbn_clients.persistence import STATE_DIR_VARIABLE
from fedbn_clients.records import arrays, tensors
from fedbn_clients.serialization import LazyArrayRecord
from fedbn_simulations.engines.client_states import ClientStates
from fedbn_simulations.flower.compat import (
    NODE_UNAVAILABLE,
    FlowerRun,
    copy_records,
    flower_run,
    set_message_id,
    with_content,
)
from fedbn_simulations.server.clock import cpu_seconds

FIRST_NODE = 1_000_000

PHASES = {"train": "training", "evaluate": "evaluation", "consensus": "synchronization"}
"""Names of the kinds of jobs in `InProcessGrid.phases`."""

MAX_OPEN_CALLS = 8 * MAX_STACK_WIDTH
"""Maximum number of open client calls; each holds the tensors of a model and about a hundred kilobytes."""


class InProcessGrid(Grid):
    """Executes a ClientApp directly, with one context per node.

    Attributes:
        contexts: node id -> context, created on first use.
        shares_memory: the nodes are in this process, so tensors can be passed by reference.
        phases: CPU seconds of the clients' jobs by kind (`PHASES`), and of handling their ``messages``.
    """

    shares_memory = True

    def __init__(
        self,
        client_app: ClientApp,
        nodes: int,
        run_config: dict[str, Any],
        *,
        run_id: int = 1,
        first_node: int = FIRST_NODE,
        fault: Callable[[Message], str | None] | None = None,
        executor: Executor = "exact",
    ) -> None:
        """Create a grid.

        Args:
            client_app: app that handles the messages.
            nodes: number of nodes.
            run_config: run-config, copied to every context.
            run_id: Flower's run id.
            first_node: node id of partition 0.
            fault: returns an error reason for messages whose node is simulated as unreachable, else None.
            executor: executor of the clients' jobs (`fedbn.stacked.executors`).
        """
        self.client_app, self.nodes, self.run_config = client_app, nodes, dict(run_config)
        self.contexts: dict[int, Context] = {}
        self._run, self._first, self._fault = flower_run(run_id), first_node, fault
        self._executor = ClientExecutor(executor)
        self._states = ClientStates(nodes)
        self._table = ClientTable(range(nodes))
        self._replies: dict[str, Message] = {}
        self._sent = 0
        self.phases: dict[str, float] = {}

    def set_run(self, run: FlowerRun) -> None:
        """Replace the run description."""
        self._run = run

    @property
    def execution(self) -> Execution:
        """How the clients' jobs were executed; empty for exact executors."""
        return self._executor.execution

    @property
    def run(self) -> FlowerRun:
        """The run description."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids, in the order of the partitions."""
        return list(range(self._first, self._first + self.nodes))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the clients of the messages, with their jobs batched, and store the replies."""
        start, in_jobs = cpu_seconds(), sum(self.phases.values())
        messages = list(messages)
        for message in messages:
            set_message_id(message, self._next_id())
        ids = [message.metadata.message_id for message in messages]
        for first in range(0, len(messages), MAX_OPEN_CALLS):
            part = slice(first, first + MAX_OPEN_CALLS)
            calls = [partial(self._deliver, m) for m in messages[part]]
            for message_id, reply in zip(ids[part], run_batched(calls, self._run_jobs)):
                set_message_id(reply, self._next_id())
                self._replies[message_id] = reply
        self._count("messages", cpu_seconds() - start - (sum(self.phases.values()) - in_jobs))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return and remove the replies to these messages."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and pull the replies; ``timeout`` is ignored."""
        return self.pull_messages(self.push_messages(messages))

    @property
    def trains_cohorts(self) -> bool:
        """Whether `train_cohort` does the same as messages.

        Messages matter to other apps and to subclasses, if they can fail, and if client states are stored on disk.
        """
        own = type(self) is InProcessGrid and self.client_app is app and self._fault is None
        return own and not self._states.on_disk and STATE_DIR_VARIABLE not in os.environ

    def train_cohort(
        self, users: list[int], received: Sequence[State], progress: Progress, trained: Iterable[int]
    ) -> StackedUpdates | None:
        """Train many clients in one call of the app, without messages.

        Args:
            users: partitions of the clients.
            received: shared entries that each client receives.
            progress: the current round.
            trained: users that should have a client state.

        Returns:
            The updates; None if client states are lost or have different entries, or the clients cannot train stacked.
        """
        if not self._move_states(users) or any(user not in self._table for user in trained):
            return None
        cohort, start = CohortRound(users, received, self._table, progress), cpu_seconds()
        result = train_cohort(self.run_config, cohort, self._executor, self._states.max_bytes)
        self._count("training", cpu_seconds() - start)
        if result is None:
            return None
        self._table.write(users, result.client_states)
        return result.updates

    def _move_states(self, users: Sequence[int]) -> bool:
        """Move the states of clients from their contexts to the table; False if they do not fit into it."""
        for user in users:
            context, name = self.contexts.get(self._first + user), f"client-state-{user}"
            if context is not None and name in context.state:
                try:
                    self._table[user] = tensors(context.state.array_records[name])
                except ValueError:
                    return False
                del context.state[name]
        return True

    def client_states(self) -> MutableMapping[int, State]:
        """Client states by user; as a table that the next round changes, if no client had to handle a message."""
        states = {
            int(name.removeprefix("client-state-")): tensors(record)
            for context in self.contexts.values()
            for name, record in context.state.array_records.items()
        }
        return dict(sorted((dict(self._table) | states).items())) if states else self._table

    def set_client_states(self, states: Mapping[int, State], device: str) -> None:
        """Set the client states of a run that continues on a device."""
        if isinstance(states, ClientTable) and states:
            users = list(states)
            self._table.write(users, {name: t.to(device) for name, t in states.take(users).items()})
            return
        for user, state in states.items():
            self.partition_context(max(user, 0)).state[f"client-state-{user}"] = arrays(state)

    def context(self, node: int) -> Context:
        """The context of a node. It lacks a client state that is in the table of the cohort.

        Raises:
            KeyError: unknown node.
        """
        if node not in self.contexts:
            if not 0 <= node - self._first < self.nodes:
                raise KeyError(node)
            node_config: dict[str, Any] = {"partition-id": node - self._first, "num-partitions": self.nodes}
            self.contexts[node] = Context(self._run.run_id, node, node_config, RecordDict(), dict(self.run_config))
        return self.contexts[node]

    def partition_context(self, partition: int) -> Context:
        """The context of the node that serves a partition, with its client state."""
        context = self.context(self._first + partition)
        if partition in self._table:
            context.state[f"client-state-{partition}"] = LazyArrayRecord(self._table.pop(partition))
        return context

    def _run_jobs(self, jobs: list[Any]) -> Sequence[object]:
        start = cpu_seconds()
        results = self._executor.run(jobs)
        self._count(PHASES[jobs[0].kind], cpu_seconds() - start)
        return results

    def _count(self, phase: str, seconds: float) -> None:
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    def _next_id(self) -> str:
        self._sent += 1
        return f"{self._run.run_id}-{self._sent}"

    def _deliver(self, message: Message) -> Message:
        try:
            context = self.context(message.metadata.dst_node_id)
        except KeyError:
            return Message(Error(NODE_UNAVAILABLE, "no such node"), reply_to=message)
        if self._fault and (reason := self._fault(message)):
            return Message(Error(NODE_UNAVAILABLE, reason), reply_to=message)
        received = with_content(message, copy_records(message.content))
        user = context.node_id - self._first
        name, in_table = f"client-state-{user}", user in self._table
        if in_table:
            context.state[name] = stored = LazyArrayRecord(self._table.row(user))
        reply = report_errors(received, context, self.client_app)  # for apps without this mod
        if in_table:
            if context.state.get(name) is stored:  # unchanged
                del context.state[name]
            else:
                del self._table[user]
        self._states.store(context.node_id, context.state)
        return reply
