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
from fedbn.federation.context import EVERYONE
from fedbn.nn.roles import State

T = TypeVar("T")


class ClientError(RuntimeError):
    """A client answered with an error; the run stops, completed rounds are kept."""


class NodePool:
    """The nodes of a grid, addressed by the user they serve.

    Attributes:
        grid: reaches them.
        users: how many there are.
        tolerate: share of those asked that may fail.
        timeout: seconds after which a client that was asked has failed; 0: never.
        failures: what went wrong so far and was survived.
        trained: the last round of each user whose training counted.
        node: user -> node id.

    Raises:
        UserError: the grid has fewer nodes than there are users.
        ClientError: a node answers with an error.
    """

    def __init__(self, grid: Grid, users: int, tolerate: float = 0.0, timeout: float = 0.0) -> None:
        """Ask every node which user it serves, until all users have one."""
        self.grid, self.users, self.tolerate, self.timeout = grid, users, tolerate, timeout
        self.failures: list[str] = []
        self.node: dict[int, int] = {}
        self.trained: dict[int, int] = {}
        while missing := set(range(users)) - self.node.keys():
            self.discover()
            if missing - self.node.keys():
                time.sleep(0.5)

    def discover(self) -> None:
        """Ask the nodes that serve nobody yet whom they serve."""
        known = set(self.node.values())
        asked = [n for n in self.grid.get_node_ids() if n not in known]
        for reply in self._exchange([Message(RecordDict(), n, "query.partition") for n in asked]):
            if reply.has_error() and self.trained and self.tolerate:
                continue
            if reply.has_error():
                raise ClientError(f"node {reply.metadata.src_node_id}: {reply.error.reason}")
            info = reply.content.config_records["info"]
            nodes = cast(int, info["num-partitions"])
            if 0 < nodes < self.users:
                raise UserError(
                    f"a federation of {nodes} nodes cannot serve {self.users} users, one each: add "
                    f"--federation-config 'num-supernodes={self.users}' to flwr run"
                )
            self.node[cast(int, info["partition-id"])] = reply.metadata.src_node_id

    def _exchange(self, messages: list[Message]) -> Iterable[Message]:
        return self.grid.send_and_receive(messages, timeout=self.timeout or None)

    def record(self, state: State) -> ArrayRecord:
        """Tensors as the nodes can take them: by reference where they are in this process."""
        return LazyArrayRecord(state) if getattr(self.grid, "shares_memory", False) else arrays(state)

    def send(self, kind: str, content: Mapping[int, RecordDict], read: Callable[[int, RecordDict], T]) -> dict[int, T]:
        """Send each user its content.

        Args:
            kind: of message.
            content: by user.
            read: what a user's reply says; raises `UserError` for a reply that is not let in.

        Returns:
            What was read, in the order of the users; without those that failed, where so many are tolerated.

        Raises:
            ClientError: a client answered with an error or not at all.
            UserError: a reply was not let in.
        """
        if any(max(user, 0) not in self.node for user in content):
            self.discover()  # a node that was started anew may have another id
        user_of = {self.node[max(user, 0)]: user for user in content if max(user, 0) in self.node}
        messages = [Message(content[user], node, kind) for node, user in user_of.items()]
        replies: dict[int, T] = {}
        failed: dict[int, Exception] = {}
        answers = self._exchange(messages)
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        for reply in answers:
            # A SuperLink answers in its own name for a node that it cannot reach.
            user = user_of[asked.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)]
            if user in replies or user in failed:
                self.failures.append(f"{kind}, {_name(user)}: answered twice; the first answer counts")
            elif reply.has_error():
                failed[user] = ClientError(f"{kind}, {_name(user)}: {reply.error.reason}")
            else:
                try:
                    replies[user] = read(user, reply.content)
                    if "lost" in reply.content:
                        self.failures.append(
                            f"{kind}, {_name(user)}: the node had lost what its user keeps, and went on like a newcomer"
                        )
                except UserError as error:
                    failed[user] = error
                except (KeyError, TypeError, ValueError) as error:
                    failed[user] = ClientError(f"{kind}, {_name(user)}: a reply that cannot be read: {error!r}")
        for user in content.keys() - replies.keys() - failed.keys():
            failed[user] = ClientError(f"{kind}, {_name(user)}: no reply")
        self._handle_failures(kind, failed, len(content))
        return {user: replies[user] for user in content if user in replies}

    def _handle_failures(self, kind: str, failed: Mapping[int, Exception], asked: int) -> None:
        """Note who failed; raise if these are too many."""
        if not failed:
            return
        first = failed[min(failed)]
        if not self.tolerate:
            raise first
        if len(failed) > int(self.tolerate * asked):
            raise ClientError(
                f"{kind}: {len(failed)} of {asked} clients failed, more than the share of {self.tolerate:g} that is "
                f"tolerated; the first: {first}"
            ) from first
        self.failures += [_line(failed[user]) for user in sorted(failed)]
        for user in failed:
            self.node.pop(max(user, 0), None)


def _name(user: int) -> str:
    return "everyone" if user == EVERYONE else f"user {user}"


def _line(error: Exception) -> str:
    first, *_ = str(error).splitlines()
    return first
