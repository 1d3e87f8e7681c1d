"""Failures of clients, disks and checkpoints: a run continues if they are tolerated, or stops with a clear error."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace

import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from safetensors.torch import save_file

from clients import persistence
from clients.app import app as client_app
from clients.records import arrays, tensors
from fedbn.errors import UserError
from fedbn.federation.loop import federate
from fedbn.federation.run import Run, plan_for
from fedbn.federation.server import ClientFailure
from fedbn.federation.setup import build_context
from fedbn.seeds import numpy_generator
from simulations.app import app as server_app
from simulations.engines.grid import InProcessGrid
from simulations.experiments.tasks import CHECKPOINT, Task, run_task
from simulations.flower.compat import task_identity
from simulations.server.nodes import ClientError
from simulations.server.rounds import Listener, run_rounds
from simulations.server.validation import InvalidReply
from simulations.storage.checkpoint import load_latest, load_outcome, previous_checkpoint, save_outcome
from tests.helpers import same

VICTIM = 3


SCENARIO = "digits8:users=4:unseen=1"


@pytest.fixture
def small():
    """A function that returns a run with few steps, because learning is not tested here."""

    def make(strategy="global-naive", *, rounds=2, scenario=SCENARIO, **settings):
        values = {"batch_size": 256, "eval_every": rounds, "global_test": 20} | settings
        return Run(scenario, strategy, plan=plan_for(scenario, rounds=rounds, **values)).resolved()

    return make


class Faulty(InProcessGrid):
    """A grid that modifies the replies of its nodes."""

    def __init__(self, run, tamper, app=client_app):
        super().__init__(app, len(build_context(run).population.users), {"run": run.to_json()})
        self.tamper = tamper

    def send_and_receive(self, messages, *, timeout=None):
        return [tampered for reply in super().send_and_receive(messages) for tampered in self.tamper(reply)]


def run_with(run, tamper, app=client_app, **listener):
    with task_identity(1):
        return run_rounds(Faulty(run, tamper, app), run, Listener(**listener))


def message_type(reply):
    return reply.metadata.message_type


def user(reply):
    return reply.metadata.src_node_id - 1_000_000


def change_content(change, what="train"):
    """Tamper function that changes the content of the victim's replies of one type."""

    def tamper(reply):
        if message_type(reply) == what and user(reply) == VICTIM:
            change(reply.content)
        return [reply]

    return tamper


def entries(change):
    """Change the victim's tensors."""

    def apply(content):
        state = {k: v.clone() for k, v in tensors(content["arrays"]).items()}
        change(state)
        content["arrays"] = arrays(state)

    return change_content(apply)


def first_float(value):
    def change(state):
        name = next(k for k, v in state.items() if v.is_floating_point())
        state[name].view(-1)[0] = value

    return change


def reshaped(state):
    name = next(k for k, v in state.items() if v.dim() > 1)
    state[name] = state[name].flatten()


def drop_reply(reply):
    return [] if message_type(reply) == "train" and user(reply) == VICTIM else [reply]


def raising(message, context):
    if context.node_config["partition-id"] == VICTIM and message.metadata.message_type == "train":
        raise ZeroDivisionError("a bug at a client")
    return client_app(message, context)


def unchanged(reply):
    return [reply]


def from_superlink(reply):
    """Modify a reply like that of a SuperLink for an unreachable node."""
    if reply.has_error():
        reply.metadata.__dict__["_src_node_id"] = 1
    return [reply]


FAULTS = {
    "raises": (unchanged, raising, ClientError, "train, user 3: ZeroDivisionError: a bug at a client"),
    "node gone": (from_superlink, raising, ClientError, "train, user 3: ZeroDivisionError"),
    "no reply": (drop_reply, client_app, ClientError, "train, user 3: no reply"),
    "NaN": (entries(first_float(float("nan"))), client_app, InvalidReply, "client 3 sent NaN or Inf in"),
    "Inf": (entries(first_float(float("inf"))), client_app, InvalidReply, "client 3 sent NaN or Inf in"),
    "shape": (entries(reshaped), client_app, InvalidReply, r"client 3 sent .* expected torch.float32 \["),
    "entry missing": (entries(lambda s: s.popitem()), client_app, InvalidReply, "unexpected or missing entries"),
    "entry too many": (
        entries(lambda s: s.update(x=torch.ones(1))),
        client_app,
        InvalidReply,
        "unexpected or missing entries: x",
    ),
    "no arrays": (
        change_content(lambda c: c.pop("arrays")),
        client_app,
        InvalidReply,
        "client 3 sent no arrays or no metrics",
    ),
    "no loss": (change_content(lambda c: c["metrics"].pop("loss")), client_app, InvalidReply, "reported the loss None"),
    "no rows": (
        change_content(lambda c: c["metrics"].update({"num-examples": 0})),
        client_app,
        InvalidReply,
        "client 3 reported 0 training examples",
    ),
    "scores unreadable": (
        change_content(lambda c: c.update(metrics=MetricRecord({"own": 1.0})), "evaluate"),
        client_app,
        ClientError,
        "evaluate, user 3: invalid reply: ValueError",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_stops_run_and_names_client(name, small):
    tamper, app, error, message = FAULTS[name]
    with pytest.raises(error, match=message):
        run_with(small("silobn"), tamper, app)


@pytest.mark.parametrize("name", FAULTS)
def test_tolerated_fault_excludes_client_and_is_recorded(name, small):
    tamper, app, _, message = FAULTS[name]
    seen = len(build_context(small()).population.seen)
    outcome = run_with(small("silobn", tolerate=1 / seen, eval_every=1), tamper, app)
    assert len(outcome.curve) == 2
    assert [f.round for f in outcome.failures] == [1, 2]
    assert all(re.search(message, f.text) and "\n" not in f.text for f in outcome.failures)
    assert outcome.notices()[0].startswith("2 client failures were tolerated; the first, in round 1: ")
    assert (VICTIM in outcome.scores) is (name != "scores unreadable")
    assert all(torch.isfinite(v).all() for v in outcome.server.state.values())


def test_missing_reply_equals_client_not_sampled(small, monkeypatch):
    """A round without the reply of a client equals a round in which that client was not sampled."""
    run = small("silobn", rounds=1, tolerate=0.4)
    outcome = run_with(run, drop_reply)
    ctx = build_context(run)
    others = [u for u in ctx.population.seen if u != VICTIM]
    assert VICTIM in ctx.population.seen
    monkeypatch.setattr(type(ctx), "sample_clients", lambda self, round: others)
    assert same(outcome.server.state, federate(run).server.state)


def test_duplicate_reply_is_ignored(small):
    run = small("silobn")
    clean = run_with(run, unchanged)

    def twice(reply):
        if message_type(reply) != "train" or user(reply) != VICTIM:
            return [reply]
        other_state = {k: v * 3 for k, v in tensors(reply.content["arrays"]).items()}
        content = RecordDict({"arrays": arrays(other_state), "metrics": reply.content["metrics"]})
        other = Message(content, reply_to=request(reply))
        return [reply, other]

    outcome = run_with(run, twice)
    assert same(outcome.server.state, clean.server.state)
    assert outcome.scores == clean.scores
    assert clean.failures == clean.notices() == []
    assert outcome.failures == [
        ClientFailure(n, "train, user 3: replied twice; only the first reply is used") for n in (1, 2)
    ]


def request(reply):
    """A message to which the reply could respond."""
    message = Message(RecordDict(), reply.metadata.src_node_id, "train")
    message.metadata._dst_node_id = reply.metadata.src_node_id
    return message


@pytest.mark.parametrize("name", ["global-recalibrated", "fedtan"])
def test_invalid_moments_are_rejected(name, small):
    def send_nan(reply):
        if message_type(reply).startswith("query") and "moments" in reply.content and user(reply) == VICTIM:
            state = {k: v * float("nan") for k, v in tensors(reply.content["moments"]).items()}
            reply.content["moments"] = arrays(state)
        return [reply]

    run = small(name, rounds=1)
    with pytest.raises(InvalidReply, match="client 3 sent NaN or Inf in"):
        run_with(run, send_nan)
    tolerant = replace(run, plan=replace(run.plan, tolerate=0.4))
    outcome = run_with(tolerant, send_nan)
    assert outcome.failures
    assert all(torch.isfinite(v).all() for v in outcome.server.serving.values())


def random_dropout(share, seed=0):
    """A tamper function that drops each client's replies with a fixed probability, reproducibly."""
    num_requests = {}

    def tamper(reply):
        if message_type(reply) != "train":
            return [reply]
        round = num_requests[user(reply)] = num_requests.get(user(reply), 0) + 1
        return [reply] if numpy_generator(seed, "drop", round, user(reply)).random() >= share else []

    return tamper


def test_training_tolerates_dropouts(small):
    run = small("fedbn", rounds=6, scenario="digits8", batch_size=64)
    plain = run_with(run, unchanged)
    tolerant = replace(run, plan=replace(run.plan, tolerate=0.9))
    outcome = run_with(tolerant, random_dropout(0.3))
    seen = len(build_context(run).population.seen)
    assert 0.15 < len(outcome.failures) / (6 * seen) < 0.45
    assert outcome.curve[-1].train_loss < outcome.curve[0].train_loss
    assert outcome.curve[-1].own > plain.curve[-1].own - 0.15


def test_too_many_failures_stop_run_after_complete_rounds(small):
    run = small("fedbn", rounds=3, tolerate=0.3)
    rounds = []

    def all_but_one(reply):
        drop = message_type(reply) == "train" and len(rounds) == 1 and user(reply) != VICTIM
        return [] if drop else [reply]

    with pytest.raises(
        ClientError, match=r"2 of 3 clients failed, more than the tolerated share of 0.3.* user \d: no reply"
    ):
        run_with(run, all_but_one, on_round=lambda number, outcome: rounds.append(number))
    assert rounds == [1]


@pytest.mark.parametrize(
    ("value", "message"), [(1.0, "tolerate must be below 1"), (-0.1, "tolerate must be at least 0")]
)
def test_plan_rejects_bad_tolerate(value, message):
    with pytest.raises(UserError, match=message):
        plan_for("digits8", tolerate=value)


def test_run_rounds_rejects_secure_sums_with_tolerate():
    plan = plan_for("digits8", rounds=1, tolerate=0.3)
    run = Run("digits8", "fedbn", plan=plan, privacy="secure=true").resolved()
    with pytest.raises(UserError, match="secure sums need every client of a round"):
        run_with(run, unchanged)


def test_late_reply_counts_as_failure(small):
    run = small("fedbn", rounds=1, tolerate=0.4)

    class Slow(InProcessGrid):
        """A grid on which the victim's training takes a minute."""

        def send_and_receive(self, messages, *, timeout=None):
            replies = super().send_and_receive(messages)
            late = timeout is not None and timeout < 60
            return [r for r in replies if not (late and message_type(r) == "train" and user(r) == VICTIM)]

    def slow(timeout):
        with task_identity(1):
            grid = Slow(client_app, 4, {"run": run.to_json()})
            return run_rounds(grid, run, timeout=timeout).failures

    assert slow(0) == slow(90) == []
    assert slow(30) == [ClientFailure(1, "train, user 3: no reply")]


# Restarted nodes -----------------------------------------------------------------------------------------


class Restarting(Faulty):
    """A grid on which the victim's node loses its memory before the last round."""

    def __init__(self, run, folder=None, damage_files=lambda folder: None):
        super().__init__(run, unchanged)
        self.folder, self.damage_files, self.rounds = folder, damage_files, 0
        self.set_state_dir()

    def set_state_dir(self):
        context = self.partition_context(VICTIM)
        if self.folder:
            context.node_config["state-dir"] = str(self.folder)

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.rounds += message_type(messages[0]) == "train"
        if self.rounds == 3 and message_type(messages[0]) == "train":
            del self.contexts[1_000_000 + VICTIM]
            self.damage_files(self.folder)
            self.set_state_dir()
        return super().send_and_receive(messages)


def run_with_restart(run, *rest):
    with task_identity(1):
        return run_rounds(Restarting(run, *rest), run, Listener())


def test_restarted_node_with_state_dir_resumes(tmp_path, small):
    run = small("fedbn", rounds=3, optimizer_state="keep", momentum=0.9)
    clean = run_with(run, unchanged)
    outcome = run_with_restart(run, tmp_path)
    assert equal(outcome, clean)
    assert outcome.failures == []
    (file,) = tmp_path.iterdir()
    assert file.name == f"run-1-user-{VICTIM}.safetensors"


def rewrite_file(folder, change):
    (file,) = folder.iterdir()
    file.write_bytes(change(file.read_bytes()))


LOSSES = {
    "no directory": None,
    "file gone": lambda folder: [file.unlink() for file in folder.iterdir()],
    "a bit changed": lambda folder: rewrite_file(folder, lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]),
    "truncated": lambda folder: rewrite_file(folder, lambda data: data[:200]),
    "another run's": lambda folder: rewrite_file(folder, lambda data: data.replace(b'run\\": 1', b'run\\": 2')),
    "no header": lambda folder: [save_file({"x": torch.ones(1)}, file) for file in folder.iterdir()],
}


@pytest.mark.parametrize("loss", LOSSES)
def test_lost_client_state_is_recorded(loss, tmp_path, small):
    run = small("fedbn", rounds=3)
    clean = run_with(run, unchanged)
    outcome = run_with_restart(run, tmp_path, LOSSES[loss]) if LOSSES[loss] else run_with_restart(run)
    assert outcome.failures == [
        ClientFailure(3, "train, user 3: the node had lost its client state and continued as a new client")
    ]
    assert not equal(outcome, clean)


def test_restart_without_client_state_is_not_recorded(small):
    run = small("global-naive", rounds=3)
    outcome = run_with_restart(run)
    assert outcome.failures == []
    assert equal(outcome, run_with(run, unchanged))


def test_client_state_of_other_owner_is_ignored(tmp_path):
    owner = {"version": persistence.FORMAT_VERSION, "run": 7, "user": 3}
    persistence._write(
        tmp_path / "f",
        owner,
        {2: {"client-state-3": {"w": torch.ones(2)}}, 5: {"client-state-3": {"w": torch.zeros(2)}}},
    )
    rounds = persistence._read(tmp_path / "f", owner)
    assert {n: records["client-state-3"]["w"].tolist() for n, records in rounds.items()} == {2: [1, 1], 5: [0, 0]}
    for other in ({"run": 8}, {"user": 4}, {"version": 1}):
        assert persistence._read(tmp_path / "f", owner | other) == {}


def test_node_pool_finds_node_with_new_id(small):
    run = small("fedbn", rounds=3, tolerate=0.4)

    class Moving(Restarting):
        """The victim's node is unreachable in round 2; afterwards another node serves that user."""

        moved = False

        def get_node_ids(self):
            return [5 if n == 1_000_000 + VICTIM and self.moved else n for n in super().get_node_ids()]

        def context(self, node):
            return super().context(1_000_000 + VICTIM if node == 5 else node)

        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            self.rounds += message_type(messages[0]) == "train"
            self.moved = self.rounds >= 2
            delivered = [m for m in messages if not (self.moved and m.metadata.dst_node_id == 1_000_000 + VICTIM)]
            return InProcessGrid.send_and_receive(self, delivered)

    with task_identity(1):
        outcome = run_rounds(Moving(run), run, Listener())
    assert [f.round for f in outcome.failures] == [2]
    assert VICTIM in outcome.scores


# Servers that are killed ---------------------------------------------------------------------------------------------


class Killed(Exception):
    """Simulates the end of a process."""


class Killing(InProcessGrid):
    """The nodes of a deployment whose server is killed during a round, after some nodes have trained."""

    def __init__(self, run, directory, at=None, run_id=1):
        config = {"run": run.to_json(), "out": str(directory / "out.safetensors")}
        super().__init__(client_app, len(build_context(run).population.users), config, run_id=run_id)
        self.directory, self.at, self.rounds = directory, at, 0

    def context(self, node):
        context = super().context(node)
        context.node_config["state-dir"] = str(self.directory / "states")
        return context

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.rounds += message_type(messages[0]) == "train"
        if self.rounds == self.at and message_type(messages[0]) == "train":
            super().send_and_receive(messages[::2])
            raise Killed
        return super().send_and_receive(messages)


def submit(run, grid):
    """Run the ServerApp as Flower does, until the run ends or is killed."""
    context = Context(grid.run.run_id, 1, {}, RecordDict(), grid.run_config)
    with task_identity(grid.run.run_id):
        server_app(grid, context)
    return load_outcome(grid.directory / "out.safetensors", run)


@pytest.mark.parametrize(("strategy", "clients"), [("fedbn", None), ("silobn", 2), ("global-recalibrated", 2)])
def test_resubmitted_run_resumes_after_server_kill(strategy, clients, small, tmp_path):
    run = small(strategy, rounds=4, optimizer_state="keep", momentum=0.5, clients_per_round=clients, eval_every=2)
    expected = run_with(run, unchanged)
    for at, run_id in (
        (1, 11),
        (3, 12),
        (2, 13),
    ):  # killed in round 1, in round 3, and in the second round after that
        with pytest.raises(Killed):
            submit(run, Killing(run, tmp_path, at, run_id))
    resumed = submit(run, Killing(run, tmp_path, run_id=14))
    assert equal(resumed, expected)
    assert resumed.failures == []
    assert resumed.trained == expected.trained
    assert [p.name for p in tmp_path.glob("out*")] == ["out.safetensors"]
    completed = Killing(run, tmp_path, at=1)
    assert equal(submit(run, completed), expected)
    assert not completed.contexts


def test_clients_match_previous_checkpoint_after_fallback(small, tmp_path):
    run = small("fedbn", rounds=5, eval_every=5)
    with pytest.raises(Killed):
        submit(run, Killing(run, tmp_path, at=4))
    (tmp_path / "out.safetensors").write_bytes(b"")
    resumed = submit(run, Killing(run, tmp_path, run_id=2))
    assert equal(resumed, run_with(run, unchanged))
    (failure,) = resumed.failures
    assert "resumed from the previous checkpoint" in failure.text


def test_training_without_reply_has_no_effect(small, tmp_path):
    """If a node is killed after writing its state but before its reply, the next round uses the state before."""
    run = small("fedbn", rounds=3, tolerate=0.4, optimizer_state="keep", momentum=0.5)

    class WithoutReply(Killing):
        def send_and_receive(self, messages, *, timeout=None):
            replies = list(super().send_and_receive(messages))
            return [r for r in replies if not (self.rounds == 2 and message_type(r) == "train" and user(r) == VICTIM)]

    class NotSampled(Killing):
        def send_and_receive(self, messages, *, timeout=None):
            self.rounds += message_type(messages[0]) == "train"
            not_sampled = self.rounds == 2 and message_type(messages[0]) == "train"
            delivered = [m for m in messages if not (not_sampled and m.metadata.dst_node_id == 1_000_000 + VICTIM)]
            return InProcessGrid.send_and_receive(self, delivered)

    without_reply = submit(run, WithoutReply(run, tmp_path / "without_reply"))
    not_sampled = submit(run, NotSampled(run, tmp_path / "not_sampled"))
    assert equal(without_reply, not_sampled)
    assert without_reply.trained[VICTIM] == 3


def test_new_run_ignores_old_client_states(small, tmp_path):
    run = small("fedbn", rounds=5, eval_every=5)
    first = submit(run, Killing(run, tmp_path))
    (tmp_path / "out.safetensors").unlink()
    again = submit(run, Killing(run, tmp_path))
    assert equal(first, again)
    assert again.failures == []
    names = {p.name for p in (tmp_path / "states").iterdir()}
    other = Killing(run, tmp_path)
    other.run_config["out"] = str(tmp_path / "another.safetensors")
    with task_identity(1):
        server_app(other, Context(1, 1, {}, RecordDict(), other.run_config))
    assert len({p.name for p in (tmp_path / "states").iterdir()}) == 2 * len(names)


def test_output_file_of_other_run_is_not_overwritten(small, tmp_path):
    submit(small("fedbn", rounds=1), Killing(small("fedbn", rounds=1), tmp_path))
    other = small("silobn", rounds=1)
    with pytest.raises(UserError, match="belongs to another run; delete it or choose another"):
        submit(other, Killing(other, tmp_path))


# Disks and checkpoints -----------------------------------------------------------------------------------------------


def run_until_killed(run, directory, rounds, tamper=None):
    """Kill a run after some rounds; its checkpoints are in ``directory``."""

    class Killed(Exception):
        pass

    def report(event):
        if event.round == rounds:
            raise Killed

    with pytest.raises(Killed):
        run_task(Task(run, str(directory)), "grid", report)


def run_to_end(run, directory):
    run_task(Task(run, str(directory)), "grid", lambda event: None)
    return load_outcome(directory / CHECKPOINT, run)


def equal(a, b):
    return same(a.server.state, b.server.state) and (a.curve, a.scores) == (b.curve, b.scores)


def truncate(data):
    return data[: len(data) // 2]


def flip_bit(data):
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def change_header(data):
    return data.replace(b'round\\": 1', b'round\\": 7')


DAMAGE = {"truncate": truncate, "bit": flip_bit, "header": change_header, "empty": lambda data: b"", "gone": None}


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory):
    """An uninterrupted run and its outcome."""
    plan = plan_for("digits8", rounds=4, eval_every=2, global_test=20, batch_size=256)
    run = Run(SCENARIO, "fedbn", plan=plan).resolved()
    return run, run_to_end(run, tmp_path_factory.mktemp("complete") / "runs" / "x")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_falls_back_to_previous(damage, tmp_path, complete_run):
    run, expected = complete_run
    directory = tmp_path / "runs" / "x"
    run_until_killed(run, directory, rounds=3)
    path = directory / CHECKPOINT
    if DAMAGE[damage] is None:
        path.unlink()
    else:
        damaged = DAMAGE[damage](path.read_bytes())
        assert damaged != path.read_bytes()
        path.write_bytes(damaged)
    resumed = run_to_end(run, directory)
    assert equal(resumed, expected)
    assert same(resumed.client_states[VICTIM], expected.client_states[VICTIM])
    (failure,) = resumed.failures
    assert failure.round == 3
    assert re.match(r"checkpoint .* cannot be read \(.*\); resumed from the previous checkpoint", failure.text)
    assert "resumed from the previous checkpoint" in (directory / "result.json").read_text()
    assert not previous_checkpoint(path).exists()


def test_load_latest_replaces_damaged_checkpoint(tmp_path, small):
    run = small("fedbn", rounds=4)
    run_until_killed(run, tmp_path / "runs" / "x", rounds=3)
    path = tmp_path / "runs" / "x" / CHECKPOINT
    path.write_bytes(b"")
    load_latest(path, run)
    assert len(load_outcome(path, run).curve) == 2
    assert not previous_checkpoint(path).exists()


def test_two_damaged_checkpoints_are_an_error(tmp_path, small):
    run = small("fedbn", rounds=4)
    run_until_killed(run, tmp_path / "runs" / "x", rounds=3)
    path = tmp_path / "runs" / "x" / CHECKPOINT
    for each in (path, previous_checkpoint(path)):
        each.write_bytes(truncate(each.read_bytes()))
    with pytest.raises(UserError, match=r"cannot be read .*: delete it and resume; its run starts again"):
        run_to_end(run, path.parent)


def test_load_latest_rejects_checkpoint_of_other_data(tmp_path, small):
    run = small("fedbn", rounds=1)
    for _ in range(2):
        save_outcome(tmp_path / "c", run, federate(run), {"data": "abc"}, previous_checkpoint(tmp_path / "c"))
    with pytest.raises(UserError, match="was written for other data"):
        load_latest(tmp_path / "c", run, {"data": "abd"})
    assert load_latest(tmp_path / "none", run) is None


def test_full_disk_stops_run_and_keeps_checkpoint(tmp_path, complete_run, monkeypatch):
    run, expected = complete_run
    directory = tmp_path / "runs" / "full"
    count = []

    def full(*anything):
        count.append(1)
        if len(count) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(persistence.os, "fsync", full)
        with pytest.raises(UserError, match="cannot write .*No space left on device; .* or free disk space"):
            run_to_end(run, directory)
    assert sorted(p.name for p in directory.iterdir()) == [CHECKPOINT, previous_checkpoint(directory / CHECKPOINT).name]
    assert len(load_outcome(directory / CHECKPOINT, run).curve) == 2
    resumed = run_to_end(run, directory)
    assert equal(resumed, expected)
    assert resumed.failures == []


def test_failures_round_trip_through_checkpoint(tmp_path, small):
    run = small("fedbn", rounds=1)
    outcome = federate(run)
    outcome.failures.append(ClientFailure(1, "train, user 3: no reply"))
    save_outcome(tmp_path / "c", run, outcome)
    assert load_outcome(tmp_path / "c", run).failures == outcome.failures
