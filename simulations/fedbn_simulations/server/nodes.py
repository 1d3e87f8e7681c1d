"""The nodes of a grid and the messages exchanged with them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeGuard, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedbn.errors import UserError
from fedbn.federation.failures import ClientError, classify, client_name
from fedbn.nn.roles import State
from fedbn_clients.errors import describe_error
from fedbn_clients.records import arrays
from fedbn_clients.serialization import LazyArrayRecord
from fedbn_simulations.server.keys import UserKeys

log = logging.getLogger(__name__)

T = TypeVar("T")

WAIT_SECONDS = 600.0
"""Seconds to wait until every user has a node."""

REPLY_SECONDS = 3600.0
"""Seconds to wait for the replies to one exchange."""

REMAINING_SECONDS = 20.0
"""Seconds to wait for the users of the other nodes when every user has a node."""

REDISCOVERY_SECONDS = 60.0
"""Seconds to wait for the user of a node that joined during a run."""

LOG_SECONDS = 30.0
"""Interval of log lines that say what the server is waiting for."""

POLL_SECONDS = 0.5

PARTITION = "partition-id", "num-partitions"
"""Entries of a node's reply to the query of its user."""

UNAVAILABLE = {3, 4, 5}
"""Flower's error codes of nodes that may come back (`fedbn_clients.errors.FLOWER_CODES`)."""


class NodePool:
    """The nodes of a grid, addressed by user.

    A node says which user it serves. Its claim is refused if it is invalid, if another node claims the same user, or if
    the user's key is that of another node. Refused nodes receive no further messages. Without ``tolerate``, the first
    refused node stops the run.

    Attributes:
        grid: grid of the nodes.
        users: number of users.
        tolerate: tolerated share of failing clients per request, and of users without a node.
        timeout: seconds to wait for the replies to an exchange.
        keys: public keys of the users' nodes; other nodes are ignored. None: nodes are trusted to name their user.
        failures: tolerated failures since they were last cleared.
        trained: user -> last round in which the user's update was aggregated.
        node: user -> node id.
        refused: node id -> why it was refused.

    Raises:
        UserError: the grid has fewer nodes than users.
        ClientError: a node was refused, or too many users have no node after ``wait`` seconds.
    """

    def __init__(
        self,
        grid: Grid,
        users: int,
        tolerate: float = 0.0,
        timeout: float = REPLY_SECONDS,
        wait: float = WAIT_SECONDS,
        keys: UserKeys | None = None,
    ) -> None:
        """Query the users of the nodes until every user has a node, for at most ``wait`` seconds."""
        self.grid, self.users, self.tolerate, self.timeout, self.keys = grid, users, tolerate, timeout, keys
        self.failures: list[str] = []
        self.node: dict[int, int] = {}
        self.trained: dict[int, int] = {}
        self.refused: dict[int, str] = {}
        self._claims: dict[int, int] = {}
        self._asked: dict[str, int] = {}
        self._is_complete = False
        self.discover(wait)
        self._is_complete = True
        if missing := self._missing():
            reasons = "; ".join(self.refused.values()) or "start a SuperNode with partition-id set to this number"
            if self.keys is not None and self.keys.ignored:
                reasons += f"; nodes without a user's key are ignored: {', '.join(map(str, sorted(self.keys.ignored)))}"
            if len(missing) > int(tolerate * users):
                raise ClientError(f"no node for {_users(missing)} after {wait:g} s: {reasons}")
            self.failures.append(f"no node for {_users(missing)} after {wait:g} s")

    def _missing(self) -> list[int]:
        return [user for user in range(self.users) if user not in self.node]

    def discover(self, seconds: float = REDISCOVERY_SECONDS) -> None:
        """Query the users of unassigned nodes, until every user has a node or ``seconds`` have passed.

        Before the run starts, this waits a little longer for the remaining nodes, which could claim the same users.
        During a run, it waits only for nodes that have joined.
        """
        start = logged = time.monotonic()
        joined: set[str] = set()
        while True:
            joined |= self._ask()
            self._read_claims()
            missing, now = self._missing(), time.monotonic()
            pending = joined & self._asked.keys()
            if not missing and not self._is_complete:
                seconds = min(seconds, now - start + REMAINING_SECONDS) if pending else 0.0
            if now - start >= seconds or (self._is_complete and not (missing and pending)):
                return
            if missing and now - logged >= LOG_SECONDS:
                logged = now
                log.warning(
                    "waiting for a node of %s, for up to %.0f s more; nodes that have not named their user yet: %s",
                    _users(missing),
                    start + seconds - now,
                    ", ".join(map(str, self._asked.values())) or "none",
                )
            time.sleep(POLL_SECONDS)

    def _ask(self) -> set[str]:
        """Ask nodes that have no user yet for their user. Returns the ids of the messages."""
        known = {*self.node.values(), *self.refused, *self._asked.values()}
        nodes = self.grid.get_node_ids() if self.keys is None else self.keys.nodes(self.grid)
        if messages := [Message(RecordDict(), node, "query.partition") for node in nodes if node not in known]:
            self.grid.push_messages(messages)
        asked = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
        self._asked |= asked
        return set(asked)

    def _read_claims(self) -> None:
        """Read the replies of nodes that were asked for their user."""
        claims: dict[int, list[int]] = {}
        for reply in self.grid.pull_messages(list(self._asked)) if self._asked else ():
            node = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if node is None or (reply.has_error() and reply.error.code in UNAVAILABLE):
                continue
            if reply.has_error():
                self._refuse(f"node {node}: {describe_error(reply.error)}", node)
                continue
            info = reply.content.get("info")
            user, nodes = (info[k] if isinstance(info, ConfigRecord) and k in info else None for k in PARTITION)
            if not _is_count(user) or not _is_count(nodes):
                self._refuse(f"node {node} did not name its user: set partition-id in its node config", node)
            elif reason := self._mistake(node, user, nodes):
                self._refuse(reason, node)
            elif user >= self.users:  # more nodes than users
                self.refused[node] = f"node {node} is not needed"
            else:
                claims.setdefault(user, []).append(node)
        for user, claimants in claims.items():
            self._assign(user, claimants)

    def _mistake(self, node: int, user: int, nodes: int) -> str:
        """What is wrong with the claim of a node to serve a user; empty if nothing is."""
        if 0 < nodes < self.users:
            return (
                f"{nodes} nodes cannot serve {self.users} users, one node per user: add --federation-config "
                f"'num-supernodes={self.users}' to flwr run, or correct num-partitions of node {node}"
            )
        if user >= max(self.users, nodes):
            return f"node {node} claims user {user}, but users are numbered 0 to {self.users - 1}"
        if self.keys is not None and self.keys.user_of(node) != user:
            return f"node {node} claims user {user}, but its key is that of user {self.keys.user_of(node)}"
        return ""

    def _assign(self, user: int, nodes: list[int]) -> None:
        """Assign a user to the only node that claims it. A node that was assigned during a run keeps its user."""
        previous = [self.node[user]] if user in self.node else []
        if len(claimants := sorted({*previous, *nodes})) == 1:
            self.node[user] = claimants[0]
            return
        named = " and ".join(f"node {node}" for node in claimants)
        if not (self._is_complete and previous):
            self.node.pop(user, None)
            self._refuse(f"{named} claim the same user, {user}: stop all but one, or bind keys to users", *claimants)
        else:
            self._claims |= dict.fromkeys(nodes, user)
            self._refuse(f"{named} claim the same user, {user}; node {previous[0]} keeps it", *nodes)

    def _refuse(self, reason: str, *nodes: int) -> None:
        if not self.tolerate:
            raise ClientError(reason)
        self.refused |= dict.fromkeys(nodes, reason)
        self.failures.append(reason)

    def _exchange(self, messages: list[Message]) -> Iterable[Message]:
        return self.grid.send_and_receive(messages, timeout=self.timeout)

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
                self.failures.append(f"{kind}, {client_name(user)}: replied twice; only the first reply is used")
            elif reply.has_error():
                failed[user] = ClientError(f"{kind}, {client_name(user)}: {describe_error(reply.error)}")
            else:
                try:
                    replies[user] = read(user, reply.content)
                    if "lost" in reply.content:
                        lost = "the node had lost its client state and continued as a new client"
                        self.failures.append(f"{kind}, {client_name(user)}: {lost}")
                except UserError as error:
                    failed[user] = error
                except (KeyError, TypeError, ValueError) as error:
                    failed[user] = ClientError(f"{kind}, {client_name(user)}: invalid reply: {classify(error).name}")
        for user in content.keys() - replies.keys() - failed.keys():
            reason = f"no reply within {self.timeout:g} s" if user in user_of.values() else "has no node"
            failed[user] = ClientError(f"{kind}, {client_name(user)}: {reason}")
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
            for node in [node for node, claimed in self._claims.items() if claimed == max(user, 0)]:
                del self._claims[node], self.refused[node]  # may be the same SuperNode, restarted with another id


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _users(users: list[int]) -> str:
    """Names of at most five users.

    >>> _users([0, 2])
    'users 0, 2'
    """
    listed = ", ".join(map(str, users[:5])) + (f" and {len(users) - 5} more" if len(users) > 5 else "")
    return f"user{'s' if len(users) > 1 else ''} {listed}"
