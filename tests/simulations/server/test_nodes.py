"""Nodes name their users; invalid and duplicate claims, silent nodes and wrong keys never stop the server."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict

from fedbn.errors import UserError
from fedbn.federation.failures import ClientError
from fedbn.federation.run import Run, plan_for
from fedbn_clients.app import app as client_app
from fedbn_simulations.app import app as server_app
from fedbn_simulations.engines.grid import FIRST_NODE, InProcessGrid
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server import nodes
from fedbn_simulations.server.keys import UserKeys, read_keys
from fedbn_simulations.server.nodes import NodePool
from fedbn_simulations.server.rounds import run_rounds
from tests.exceptions import SECRET, is_private

USERS = 3
SCENARIO = f"digits8:users={USERS}:unseen=0"


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(nodes, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(nodes, "REMAINING_SECONDS", 0.05)
    monkeypatch.setattr(nodes, "REDISCOVERY_SECONDS", 0.05)


class Nodes(InProcessGrid):
    """Nodes with changed node configs or changed replies to the query of their user.

    Attributes:
        silent: ids of nodes whose replies to this query do not arrive in the first ``silent_pulls`` pulls.
        keys: public key by node id.
    """

    def __init__(self, *configs, reply=lambda node, info: info, silent=(), silent_pulls=10**9, **options):
        super().__init__(client_app, len(configs), options.get("run_config", {}))
        self.configs, self.reply, self.silent, self.silent_pulls = configs, reply, silent, silent_pulls
        self.receiver = {}
        if keys := options.get("keys"):
            self.get_nodes = lambda: [SimpleNamespace(node_id=n, public_key=k) for n, k in keys.items()]

    def context(self, node):
        context = super().context(node)
        context.node_config.clear()
        context.node_config.update(self.configs[node - FIRST_NODE])
        return context

    def push_messages(self, messages):
        messages = list(messages)
        ids = super().push_messages(messages)
        self.receiver |= {i: m.metadata.dst_node_id for i, m in zip(ids, messages, strict=True)}
        return ids

    def pull_messages(self, message_ids):
        self.silent_pulls -= 1
        silent = self.silent if self.silent_pulls >= 0 else ()
        replies = super().pull_messages([i for i in message_ids if self.receiver[i] not in silent])
        for reply in replies:
            if reply.metadata.message_type == "query.partition" and reply.has_content():
                reply.content["info"] = self.reply(reply.metadata.src_node_id, reply.content["info"])
        return replies


def good(user, nodes=USERS):
    return {"partition-id": user, "num-partitions": nodes}


def pool(grid, **options):
    with task_identity(1):
        return NodePool(grid, USERS, **{"wait": 0.05} | options)


BAD_CONFIGS = {
    "negative": good(-1),
    "huge": good(2**40),
    "larger than a record": good(2**70),
    "text": good(SECRET),
    "number as text": good("2"),
    "fraction": good(2.5),
    "NaN": good(float("nan")),
    "boolean": good(True),
    "missing": {},
    "bad number of nodes": good(2, SECRET),
    "negative number of nodes": good(2, -3),
    "wrong": good(USERS),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_partition_id_stops_run_and_names_node(name):
    grid = Nodes(good(0), good(1), BAD_CONFIGS[name])
    with pytest.raises(ClientError, match=rf"^node {FIRST_NODE + 2}( claims user 3|: UserError \(code 101)"):
        pool(grid)


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_partition_id_is_tolerated(name):
    nodes = pool(Nodes(good(0), good(1), BAD_CONFIGS[name]), tolerate=0.4)
    assert nodes.node == {0: FIRST_NODE, 1: FIRST_NODE + 1}
    first, last = nodes.failures
    assert first.startswith(f"node {FIRST_NODE + 2}")
    assert last == "no node for user 2 after 0.05 s"
    assert not is_private(nodes.failures)


def config(**values):
    return lambda node, info: ConfigRecord({k.replace("_", "-"): v for k, v in values.items()})


BAD_REPLIES = {
    "no record": lambda node, info: ArrayRecord(),
    "empty": config(),
    "text": config(partition_id=SECRET, num_partitions=3),
    "list": config(partition_id=[1], num_partitions=3),
    "bytes": config(partition_id=b"1", num_partitions=3),
    "fraction": config(partition_id=1.0, num_partitions=3),
    "boolean": config(partition_id=True, num_partitions=3),
    "negative": config(partition_id=-1, num_partitions=3),
    "huge": config(partition_id=2**62, num_partitions=3),
    "textual number of nodes": config(partition_id=1, num_partitions=SECRET),
    "negative number of nodes": config(partition_id=1, num_partitions=-1),
    "too few nodes": config(partition_id=1, num_partitions=2),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_bad_reply_of_modified_node_is_refused(name):
    def reply(node, info):
        return BAD_REPLIES[name](node, info) if node == FIRST_NODE + 1 else info

    grid = Nodes(*map(good, range(USERS)), reply=reply)
    with pytest.raises(ClientError, match=f"node {FIRST_NODE + 1}"):
        pool(grid)
    tolerant = pool(Nodes(*map(good, range(USERS)), reply=reply), tolerate=0.4)
    assert tolerant.node.keys() == {0, 2}
    assert not is_private(tolerant.failures)


def test_duplicate_claim_names_both_nodes():
    grid = Nodes(good(0), good(1), good(1), good(2))
    message = f"node {FIRST_NODE + 1} and node {FIRST_NODE + 2} claim the same user, 1: stop all but one"
    with pytest.raises(ClientError, match=message):
        pool(grid)
    tolerant = pool(grid, tolerate=0.4)
    assert tolerant.node == {0: FIRST_NODE, 2: FIRST_NODE + 3}
    assert message in tolerant.failures[0]
    with pytest.raises(ClientError, match=rf"no node for user 1 after 0.05 s: {message}"):
        pool(grid, tolerate=0.1)


def test_unavailable_node_is_asked_again():
    grid, unavailable = Nodes(*map(good, range(USERS))), iter([True, True])
    grid._fault = lambda message: (
        "gone" if message.metadata.dst_node_id == FIRST_NODE and next(unavailable, 0) else None
    )
    found = pool(grid, wait=60)
    assert found.node.keys() == {0, 1, 2}
    assert found.failures == []
    assert not any(unavailable)


def test_late_duplicate_claim_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr(nodes, "REMAINING_SECONDS", 60)
    grid = Nodes(*map(good, range(USERS)), good(2), silent=[FIRST_NODE + 3], silent_pulls=2)
    with pytest.raises(ClientError, match=f"node {FIRST_NODE + 2} and node {FIRST_NODE + 3} claim the same user, 2"):
        pool(grid, wait=60)


def test_silent_node_without_user_delays_run_by_limit_only():
    grid = Nodes(*map(good, range(USERS)), good(2), silent=[FIRST_NODE + 3])
    start = time.monotonic()
    assert pool(grid, wait=60).node.keys() == {0, 1, 2}
    assert time.monotonic() - start < 5


def test_node_that_joins_a_run_does_not_take_over_a_user():
    grid = Nodes(*map(good, range(USERS)), good(1))
    grid.nodes = USERS
    found = pool(grid, tolerate=0.4)
    grid.nodes = USERS + 1
    found.node.pop(2)
    with task_identity(1):
        found.discover()
    assert found.node == {user: FIRST_NODE + user for user in range(USERS)}
    (failure,) = found.failures
    assert failure.endswith(f"claim the same user, 1; node {FIRST_NODE + 1} keeps it")
    # If its node fails, the new one may be the same SuperNode with another id.
    found._handle_failures("train", {1: ClientError("no reply")}, USERS)
    grid.get_node_ids = lambda: [FIRST_NODE + 3]
    with task_identity(1):
        found.discover()
    assert found.node[1] == FIRST_NODE + 3


@pytest.mark.parametrize("tolerate", [0.0, 0.4])
def test_silent_node_does_not_hang_server(tolerate):
    start = time.monotonic()
    grid = Nodes(*map(good, range(USERS)), silent=[FIRST_NODE + 2])
    if tolerate:
        assert pool(grid, tolerate=tolerate).node.keys() == {0, 1}
    else:
        with pytest.raises(ClientError, match=r"no node for user 2 after 0.05 s: start a SuperNode with partition-id"):
            pool(grid)
    assert time.monotonic() - start < 2


def test_server_says_what_it_waits_for(monkeypatch, caplog):
    monkeypatch.setattr(nodes, "LOG_SECONDS", 0.02)
    with pytest.raises(ClientError):
        pool(Nodes(good(0), good(1), good(2), silent=[FIRST_NODE + 1]))
    assert "waiting for a node of user 1, for up to 0 s more; nodes that have not named" in caplog.text
    assert f"their user yet: {FIRST_NODE + 1}" in caplog.text


def test_more_nodes_than_users_are_ignored():
    found = pool(Nodes(*(good(i, 5) for i in range(5))))
    assert found.node == {user: FIRST_NODE + user for user in range(USERS)}
    assert found.failures == []


def test_run_continues_without_refused_node():
    plan = plan_for(SCENARIO, rounds=2, batch_size=256, eval_every=2, global_test=20, tolerate=0.4)
    run = Run(SCENARIO, "fedbn", plan=plan).resolved()
    grid = Nodes(good(0), good(1), good(SECRET), run_config={"run": run.to_json()})
    with task_identity(1):
        outcome = run_rounds(grid, run, wait=0.1)
    assert outcome.scores.keys() == {0, 1}
    texts = [failure.text for failure in outcome.failures]
    assert "train, user 2: has no node" in texts
    assert not is_private(texts)


# Users bound to keys -------------------------------------------------------------------------------------------------


def key_pair():
    """A public key as a line of an OpenSSH file, and as Flower shows it."""
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    line = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return f"{line} comment", key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


PAIRS = [key_pair() for _ in range(5)]


def bound(*claims, of=range(5), **options):
    """Nodes that claim these users; node ``i`` holds key ``of[i]``, and user ``i`` is bound to key ``i``."""
    grid = Nodes(*map(good, claims), keys={FIRST_NODE + i: PAIRS[of[i]][1] for i in range(len(claims))})
    return pool(grid, keys=UserKeys({user: PAIRS[user][0] for user in range(USERS)}), **options)


def test_keys_bind_users_to_nodes():
    assert bound(0, 1, 2).node == {user: FIRST_NODE + user for user in range(USERS)}


def test_node_without_key_of_user_is_ignored():
    assert bound(0, 1, 2, 1, 2).node == {user: FIRST_NODE + user for user in range(USERS)}
    message = rf"no node for user 2 .* nodes without a user's key are ignored: {FIRST_NODE + 2}"
    with pytest.raises(ClientError, match=message):
        bound(0, 1, 2, of=[0, 1, 4])


def test_node_that_claims_other_user_than_its_key_is_refused():
    with pytest.raises(ClientError, match=f"node {FIRST_NODE} claims user 1, but its key is that of user 0"):
        bound(1, 0, 2)
    assert bound(0, 1, 1, tolerate=0.4).node == {0: FIRST_NODE, 1: FIRST_NODE + 1}


def test_keys_need_authenticated_nodes():
    with pytest.raises(UserError, match="users are bound to keys, but this engine has none: remove users"):
        pool(Nodes(*map(good, range(USERS))), keys=UserKeys({0: PAIRS[0][0]}))


BAD_KEY_FILES = {
    "not valid TOML": "0 = ",
    "has no key for user 1": f"0 = '{PAIRS[0][0]}'",
    "has a key for unknown user 7": f"0 = '{PAIRS[0][0]}'\n1 = '{PAIRS[1][0]}'\n7 = '{PAIRS[2][0]}'",
    "user 1 is not a string": f"0 = '{PAIRS[0][0]}'\n1 = 5",
    "key of user 1 is not an OpenSSH public key": f"0 = '{PAIRS[0][0]}'\n1 = 'ecdsa {SECRET}'",
    "users 0 and 1 have the same key": f"0 = '{PAIRS[0][0]}'\n1 = '{PAIRS[0][0]}'",
}


@pytest.mark.parametrize("message", BAD_KEY_FILES)
def test_read_keys_rejects_bad_file(message, tmp_path):
    (tmp_path / "keys.toml").write_text(BAD_KEY_FILES[message])
    with pytest.raises(UserError, match=message):
        read_keys(tmp_path / "keys.toml", 2)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_keys(tmp_path / "none.toml", 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"timeout": 0.0}, "timeout=0.0 in the run config: give a positive number of seconds"),
        ({"timeout": "soon"}, "timeout='soon' in the run config"),
        ({"wait": -1}, "wait=-1 in the run config"),
        ({"wait": float("nan")}, "wait=nan in the run config"),
        ({"wait": float("inf")}, "wait=inf in the run config"),
        ({"users": "/nowhere/keys.toml"}, "/nowhere/keys.toml cannot be read"),
    ],
)
def test_server_rejects_bad_limits_and_keys(config, message):
    run = Run(SCENARIO, "fedbn", plan=plan_for(SCENARIO, rounds=1)).resolved()
    with pytest.raises(UserError, match=message):
        server_app(Nodes(), Context(1, 1, {}, RecordDict(), {"run": run.to_json()} | config))


def test_silent_client_is_named_with_limit():
    class Silent(Nodes):
        def send_and_receive(self, messages, *, timeout=None):
            assert timeout == 7
            return [r for r in super().send_and_receive(messages) if r.metadata.src_node_id != FIRST_NODE + 1]

    run = Run(SCENARIO, "fedbn", plan=plan_for(SCENARIO, rounds=1, batch_size=256)).resolved()
    grid = Silent(*map(good, range(USERS)), run_config={"run": run.to_json()})
    with task_identity(1), pytest.raises(ClientError, match="train, user 1: no reply within 7 s"):
        run_rounds(grid, run, timeout=7)
