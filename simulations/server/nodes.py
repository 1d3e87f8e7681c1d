"""The nodes of a grid and the messages exchanged with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar, cast

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from clients.records import arrays
from clients.serialization import LazyArrayRecord
from fedbn.errors import UserError
from fedbn.federation.context import CENTRAL_TRAINER
from fedbn.nn.roles import State

T = TypeVar("T")


class ClientError(RuntimeError):
    """A client failed; the run stops, and completed rounds are kept."""


class NodePool:
    """The nodes of a grid, addressed by user.

    Attributes:
        grid: grid of the nodes.
        users: number of users.
        tolerate: tolerated share of failing clients per request.
        timeout: seconds to wait for replies; 0: no limit.
        failures: tolerated failures since they were last cleared.
        trained: user -> last round in which the user's update was aggregated.
        node: user -> node id.

    Raises:
        UserError: the grid has fewer nodes than users.
        ClientError: a node replies with an error.
    """

    def __init__(self, grid: Grid, users: int, tolerate: float = 0.0, timeout: float = 0.0) -> None:
        """Query the partitions of the nodes until every user has a node."""
        self.grid, self.users, self.tolerate, self.timeout = grid, users, tolerate, timeout
        self.failures: list[str] = []
        self.node: dict[int, int] = {}
        self.trained: dict[int, int] = {}
        while missing := set(range(users)) - self.node.keys():
            self.discover()
            if missing - self.node.keys():
                time.sleep(0.5)

    def discover(self) -> None:
        """Query the partitions of unassigned nodes."""
        known = set(self.node.values())
        unassigned = [n for n in self.grid.get_node_ids() if n not in known]
        for reply in self._exchange([Message(RecordDict(), n, "query.partition") for n in unassigned]):
            if reply.has_error() and self.trained and self.tolerate:
                continue
            if reply.has_error():
                raise ClientError(f"node {reply.metadata.src_node_id}: {reply.error.reason}")
            info = reply.content.config_records["info"]
            nodes = cast(int, info["num-partitions"])
            if 0 < nodes < self.users:
                raise UserError(
                    f"{nodes} nodes cannot serve {self.users} users, one node per user: add "
                    f"--federation-config 'num-supernodes={self.users}' to flwr run"
                )
            self.node[cast(int, info["partition-id"])] = reply.metadata.src_node_id

    def _exchange(self, messages: list[Message]) -> Iterable[Message]:
        return self.grid.send_and_receive(messages, timeout=self.timeout or None)

    def record(self, state: State) -> ArrayRecord:
        """Convert tensors to a record, by reference if the nodes are in this process."""
        return LazyArrayRecord(state) if getattr(self.grid, "shares_memory", False) else arrays(state)

    def send(self, kind: str, content: Mapping[int, RecordDict], read: Callable[[int, RecordDict], T]) -> dict[int, T]:
        """Send a message to each user and read the replies.

        Args:
            kind: message type.
            content: user -> content of the message.
            read: decodes the reply of a user; raises `UserError` for an invalid reply.

        Returns:
            Decoded replies by user, in the order of ``content``, without tolerated failures.

        Raises:
            ClientError: a client replied with an error or did not reply.
            UserError: a reply was invalid.
        """
        if any(max(user, 0) not in self.node for user in content):
            self.discover()  # a restarted node can have another id
        user_of = {self.node[max(user, 0)]: user for user in content if max(user, 0) in self.node}
        messages = [Message(content[user], node, kind) for node, user in user_of.items()]
        replies: dict[int, T] = {}
        failed: dict[int, Exception] = {}
        exchanged = self._exchange(messages)
        receiver = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        for reply in exchanged:
            # For an unreachable node the SuperLink itself replies.
            user = user_of[receiver.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)]
            if user in replies or user in failed:
                self.failures.append(f"{kind}, {_label(user)}: replied twice; only the first reply is used")
            elif reply.has_error():
                failed[user] = ClientError(f"{kind}, {_label(user)}: {reply.error.reason}")
            else:
                try:
                    replies[user] = read(user, reply.content)
                    if "lost" in reply.content:
                        lost = "the node had lost its client state and continued as a new client"
                        self.failures.append(f"{kind}, {_label(user)}: {lost}")
                except UserError as error:
                    failed[user] = error
                except (KeyError, TypeError, ValueError) as error:
                    failed[user] = ClientError(f"{kind}, {_label(user)}: invalid reply: {error!r}")
        for user in content.keys() - replies.keys() - failed.keys():
            failed[user] = ClientError(f"{kind}, {_label(user)}: no reply")
        self._handle_failures(kind, failed, len(content))
        return {user: replies[user] for user in content if user in replies}

    def _handle_failures(self, kind: str, failed: Mapping[int, Exception], num_clients: int) -> None:
        """Record tolerated failures; raise if there are too many."""
        if not failed:
            return
        first = failed[min(failed)]
        if not self.tolerate:
            raise first
        if len(failed) > int(self.tolerate * num_clients):
            raise ClientError(
                f"{kind}: {len(failed)} of {num_clients} clients failed, more than the tolerated share of "
                f"{self.tolerate:g}; the first: {first}"
            ) from first
        self.failures += [str(failed[user]).splitlines()[0] for user in sorted(failed)]
        for user in failed:
            self.node.pop(max(user, 0), None)


def _label(user: int) -> str:
    return "central trainer" if user == CENTRAL_TRAINER else f"user {user}"
