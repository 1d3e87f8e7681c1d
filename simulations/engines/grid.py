"""The default engine: a Flower Grid in this process, running the same apps without Ray.

Node ``p`` has partition id ``p``; each has its own `Context`, whose state lives as long as the grid. Messages
carry the same records as over the network; containers are copied, so that no client sees another's writes.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from clients.jobs import run_batched
from fedbn.stacked.executors import WIDEST, ClientExecutor, Executor
from simulations.engines.client_states import ClientStates
from simulations.flower.compat import (
    CLIENT_APP_RAISED,
    NODE_UNAVAILABLE,
    FlowerRun,
    copy_records,
    flower_run,
    set_message_id,
    with_content,
)

FIRST_NODE = 1_000_000

CROWD = 8 * WIDEST
"""Most clients whose calls are open at the same time: each holds a model's tensors and a hundred kilobytes more."""


class InProcessGrid(Grid):
    """Executes a ClientApp directly, one context a node.

    Attributes:
        contexts: node id -> context, made when a node is first addressed.
        shares_memory: the nodes are in this process, so that tensors can be passed by reference.
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
        """Make a grid.

        Args:
            client_app: run for every message.
            nodes: how many nodes there are.
            run_config: given to every context, in a copy of its own.
            run_id: Flower's run id.
            first_node: node id of partition 0.
            fault: may give a reason why a message's node cannot be reached.
            executor: how the jobs of many clients are done (`fedbn.stacked.executors`).
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
    def run(self) -> FlowerRun:
        """The run description."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, in the order of their partitions."""
        return list(range(self._first, self._first + self.nodes))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the messages' clients, their jobs together; replies wait to be pulled."""
        messages = list(messages)
        for message in messages:
            set_message_id(message, self._next_id())
        ids = [message.metadata.message_id for message in messages]
        for first in range(0, len(messages), CROWD):
            crowd = slice(first, first + CROWD)
            calls = [partial(self._deliver, m) for m in messages[crowd]]
            for number, reply in zip(ids[crowd], run_batched(calls, self._executor.run)):
                set_message_id(reply, self._next_id())
                self._replies[number] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to these messages, each once."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and pull; nothing is waited for, so ``timeout`` has no meaning here."""
        return self.pull_messages(self.push_messages(messages))

    def context(self, node: int) -> Context:
        """A node's context.

        Raises:
            KeyError: no such node.
        """
        if node not in self.contexts:
            if not 0 <= node - self._first < self.nodes:
                raise KeyError(node)
            self.contexts[node] = Context(
                run_id=self._run.run_id,
                node_id=node,
                node_config={"partition-id": node - self._first, "num-partitions": self.nodes},
                state=RecordDict(),
                run_config=dict(self.run_config),
            )
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
        before = copy_records(context.state)
        try:
            reply = self.client_app(with_content(message, copy_records(message.content)), context)
            self._states.keep(context.node_id, context.state)
            return reply
        except Exception as error:  # as everywhere in Flower: an error reply, and the run goes on
            context.state = before
            trace = traceback.format_exc(limit=-4)
            return Message(Error(CLIENT_APP_RAISED, f"{type(error).__name__}: {error}\n{trace}"), reply_to=message)
