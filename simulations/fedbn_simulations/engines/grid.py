"""The default engine: a Flower Grid in this process, running the same apps without Ray.

Node ``p`` has partition id ``p`` and its own `Context`, whose state lives as long as the grid. Messages carry the same
records as over the network; containers are copied, so that clients do not see each other's changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedbn.stacked.executors import MAX_STACK_WIDTH, ClientExecutor, Execution, Executor
from fedbn_clients.errors import report_errors
from fedbn_clients.jobs import run_batched
from fedbn_simulations.engines.client_states import ClientStates
from fedbn_simulations.flower.compat import (
    NODE_UNAVAILABLE,
    FlowerRun,
    copy_records,
    flower_run,
    set_message_id,
    with_content,
)

FIRST_NODE = 1_000_000

MAX_OPEN_CALLS = 8 * MAX_STACK_WIDTH
"""Maximum number of open client calls; each holds the tensors of a model and about a hundred kilobytes."""


class InProcessGrid(Grid):
    """Executes a ClientApp directly, with one context per node.

    Attributes:
        contexts: node id -> context, created on first use.
        shares_memory: the nodes are in this process, so tensors can be passed by reference.
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
        self._replies: dict[str, Message] = {}
        self._sent = 0

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
        messages = list(messages)
        for message in messages:
            set_message_id(message, self._next_id())
        ids = [message.metadata.message_id for message in messages]
        for first in range(0, len(messages), MAX_OPEN_CALLS):
            part = slice(first, first + MAX_OPEN_CALLS)
            calls = [partial(self._deliver, m) for m in messages[part]]
            for message_id, reply in zip(ids[part], run_batched(calls, self._executor.run)):
                set_message_id(reply, self._next_id())
                self._replies[message_id] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return and remove the replies to these messages."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and pull the replies; ``timeout`` is ignored."""
        return self.pull_messages(self.push_messages(messages))

    def context(self, node: int) -> Context:
        """The context of a node.

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
        """The context of the node that serves a partition."""
        return self.context(self._first + partition)

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
        reply = report_errors(received, context, self.client_app)  # for apps without this mod
        self._states.store(context.node_id, context.state)
        return reply
