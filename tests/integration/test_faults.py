"""Failures of clients, disks and checkpoints: a run continues if they are tolerated, or stops with a clear error."""

from __future__ import annotations

import errno
import os
import re
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from safetensors.torch import save_file

from fedbn.errors import UserError
from fedbn.federation.failures import ClientError
from fedbn.federation.loop import federate
from fedbn.federation.run import Run, plan_for
from fedbn.federation.server import ClientFailure
from fedbn.federation.setup import build_context
from fedbn.seeds import numpy_generator
from fedbn_clients import persistence
from fedbn_clients.app import app as client_app
from fedbn_clients.records import arrays, tensors
from fedbn_simulations.app import app as server_app
from fedbn_simulations.engines.grid import FIRST_NODE, InProcessGrid
from fedbn_simulations.experiments.tasks import CHECKPOINT, Task, run_task
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.nodes import REPLY_SECONDS
from fedbn_simulations.server.rounds import Listener, run_rounds
from fedbn_simulations.server.safeguards import SIMULATION_CONFIG, Safeguards
from fedbn_simulations.server.validation import InvalidReply
from fedbn_simulations.storage import checkpoint as checkpoints
from fedbn_simulations.storage.checkpoint import (
    CheckpointWriter,
    load_latest,
    load_outcome,
    previous_checkpoint,
    save_outcome,
)
from tests.helpers import mostly_slow, same

SCENARIO = "digits8:users=4:unseen=1:images=600"
VICTIM = 3
NODE = FIRST_NODE + VICTIM
"""Node of the victim."""


@pytest.fixture
def small():
    """A function that returns a run with few steps, because learning is not tested here."""

    def make(strategy="global-naive", *, rounds=2, scenario=SCENARIO, **settings):
        values = {"batch_size": 256, "eval_every": rounds, "global_test": 20} | settings
        return Run(scenario, strategy, plan=plan_for(scenario, rounds=rounds, **values)).resolved()

    return make


def unchanged(reply):
    return [reply]


class Faulty(InProcessGrid):
    """A grid that counts rounds and modifies the replies of its nodes."""

    round, is_training = 0, False

    def __init__(self, run, tamper=unchanged, app=client_app, run_id=1, **config):
        users = build_context(run).population.users
        super().__init__(app, len(users), {"run": run.to_json(), **config}, run_id=run_id)
        self.tamper = tamper

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.is_training = any(m.metadata.message_type == "train" for m in messages)
        self.round += self.is_training
        replies = super().send_and_receive(self.delivered(messages))
        return [tampered for reply in replies for tampered in self.tamper(reply)]

    def delivered(self, messages):
        """The messages that reach their nodes."""
        return messages


def run_on(grid, run, timeout=REPLY_SECONDS, **listener):
    with task_identity(1):
        return run_rounds(grid, run, Listener(**listener), timeout)


def run_with(run, *faults, **listener):
    return run_on(Faulty(run, *faults), run, **listener)


def is_victims(reply, kind="train"):
    return reply.metadata.message_type == kind and reply.metadata.src_node_id == NODE


def edit(change, kind="train"):
    """Tamper function that changes the content of the victim's replies of one type."""

    def tamper(reply):
        if is_victims(reply, kind):
            change(reply.content)
        return [reply]

    return tamper


def edit_tensors(change, record="arrays", kind="train"):
    """Tamper function that changes the victim's tensors."""

    def apply(content):
        state = {k: v.clone() for k, v in tensors(content[record]).items()}
        change(state)
        content[record] = arrays(state)

    return edit(apply, kind)


def first_float(value):
    def change(state):
        next(v for v in state.values() if v.is_floating_point()).view(-1)[0] = value

    return change


def reshape(state):
    name = next(k for k, v in state.items() if v.dim() > 1)
    state[name] = state[name].flatten()


def drop_reply(reply):
    return [] if is_victims(reply) else [reply]


def raising(message, context):
    if context.node_config["partition-id"] == VICTIM and message.metadata.message_type == "train":
        raise ZeroDivisionError("a bug at a client")
    return client_app(message, context)


def from_superlink(reply):
    """Modify a reply like that of a SuperLink for an unreachable node."""
    if reply.has_error():
        reply.metadata.__dict__["_src_node_id"] = 1
    return [reply]


FAULTS = {
    "raises": (
        ClientError,
        r"train, user 3: ZeroDivisionError \(code 105: .*\); the log",
        unchanged,
        raising,
    ),
    "node gone": (ClientError, "train, user 3: ZeroDivisionError", from_superlink, raising),
    "no reply": (ClientError, "train, user 3: no reply", drop_reply),
    "NaN": (InvalidReply, "client 3 sent NaN or Inf in", edit_tensors(first_float(float("nan")))),
    "Inf": (InvalidReply, "client 3 sent NaN or Inf in", edit_tensors(first_float(float("inf")))),
    "shape": (InvalidReply, r"client 3 sent .* expected torch.float32 \[", edit_tensors(reshape)),
    "entry missing": (InvalidReply, "unexpected or missing entries", edit_tensors(lambda s: s.popitem())),
    "entry too many": (
        InvalidReply,
        "unexpected or missing entries: x",
        edit_tensors(lambda s: s.update(x=torch.ones(1))),
    ),
    "no arrays": (InvalidReply, "client 3 sent no arrays or no metrics", edit(lambda c: c.pop("arrays"))),
    "no loss": (InvalidReply, "reported the loss None", edit(lambda c: c["metrics"].pop("loss"))),
    "no rows": (
        InvalidReply,
        "client 3 reported 0 training examples",
        edit(lambda c: c["metrics"].update({"num-examples": 0})),
    ),
    "scores unreadable": (
        InvalidReply,
        "client 3 sent unexpected or missing scores: ",
        edit(lambda c: c.update(metrics=MetricRecord({"own": 1.0})), "evaluate"),
    ),
    "scores impossible": (
        InvalidReply,
        r"client 3 reported 1\.5 as own aggregated accuracy",
        edit(lambda c: c["metrics"].update({"own|aggregated|accuracy": 1.5}), "evaluate"),
    ),
    "implausible": (InvalidReply, r"client 3 sent 3e\+38 in .*, expected -1e\+15 to", edit_tensors(first_float(3e38))),
    "too many rows": (
        InvalidReply,
        "client 3 reported 10{18} training examples",
        edit(lambda c: c["metrics"].update({"num-examples": 10**18})),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_stops_run_and_names_client(name, small):
    error, message, *faults = FAULTS[name]
    with pytest.raises(error, match=message):
        run_with(small("silobn"), *faults)


@pytest.mark.parametrize("name", mostly_slow(FAULTS, "raises", "no reply", "NaN", "shape"))
def test_tolerated_fault_excludes_client_and_is_recorded(name, small):
    _, message, *faults = FAULTS[name]
    seen = len(build_context(small()).population.seen)
    outcome = run_with(small("silobn", tolerate=1 / seen, eval_every=1), *faults)
    assert len(outcome.curve) == 2
    assert [f.round for f in outcome.failures] == [1, 2]
    assert all(re.search(message, f.text) and "\n" not in f.text for f in outcome.failures)
    assert outcome.notices()[0].startswith("2 client failures were tolerated; the first, in round 1: ")
    assert (VICTIM in outcome.scores) is not name.startswith("scores")
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
    clean = run_with(run)

    def twice(reply):
        if not is_victims(reply):
            return [reply]
        request = Message(RecordDict(), NODE, "train")  # one to which the reply could respond
        request.metadata._dst_node_id = NODE
        state = {k: v * 3 for k, v in tensors(reply.content["arrays"]).items()}
        content = RecordDict({"arrays": arrays(state), "metrics": reply.content["metrics"]})
        return [reply, Message(content, reply_to=request)]

    outcome = run_with(run, twice)
    assert same(outcome.server.state, clean.server.state)
    assert outcome.scores == clean.scores
    assert clean.failures == clean.notices() == []
    assert outcome.failures == [
        ClientFailure(n, "train, user 3: replied twice; only the first reply is used") for n in (1, 2)
    ]


@pytest.mark.parametrize("name", ["global-recalibrated", "fedtan"])
def test_invalid_moments_are_rejected(name, small):
    def to_nan(state):
        state.update({k: v * float("nan") for k, v in state.items()})

    def send_nan(reply):
        sent = reply.metadata.message_type.startswith("query") and "moments" in reply.content
        return edit_tensors(to_nan, "moments", reply.metadata.message_type)(reply) if sent else [reply]

    run = small(name, rounds=1)
    with pytest.raises(InvalidReply, match="client 3 sent NaN or Inf in"):
        run_with(run, send_nan)
    tolerant = replace(run, plan=replace(run.plan, tolerate=0.4))
    outcome = run_with(tolerant, send_nan)
    assert outcome.failures
    assert all(torch.isfinite(v).all() for v in outcome.server.serving.values())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("global-recalibrated", lambda m: m.clear(), "sent unexpected or missing entries"),
        ("global-recalibrated", lambda m: m.update({k: -v for k, v in m.items() if k.endswith("m2")}), "expected 0 to"),
        ("static-bn", lambda m: m.update({k: -v for k, v in m.items() if k.endswith("var|mean")}), "expected 0 to 1e"),
        ("fedtan", lambda m: m.update({k: v * 0 + 1e30 for k, v in m.items() if k.endswith("|n")}), r"sent 1e\+30 in"),
    ],
)
def test_implausible_moments_are_rejected(name, change, message, small):
    def tamper(reply):
        return (
            edit_tensors(change, "moments", reply.metadata.message_type)(reply)
            if "moments" in reply.content
            else [reply]
        )

    with pytest.raises(InvalidReply, match=f"client 3 .*{message}"):
        run_with(small(name, rounds=1), tamper)


@pytest.mark.parametrize(
    ("limits", "change", "message"),
    [
        ({"max_norm": 1e-3}, unchanged, r"sent a change of the parameters of norm .*, at most 0\.001"),
        ({"max_examples": 5}, unchanged, r"reported \d+ training examples"),
        (
            {"max_statistic": 10.0},
            edit_tensors(lambda s: s["hidden.1.running_mean"].fill_(11)),
            "sent 11 in hidden.1.running_mean",
        ),
    ],
)
def test_limits_of_deployments_reject_replies(limits, change, message, small):
    run = replace(small("global-naive", rounds=1), model="mlp")
    no_limits = Safeguards.from_config(SIMULATION_CONFIG)
    for safeguards in (no_limits, Safeguards.from_config(limits)):
        grid = Faulty(run, change)
        with task_identity(1), nullcontext() if safeguards is no_limits else pytest.raises(InvalidReply, match=message):
            run_rounds(grid, run, safeguards=safeguards)


def random_dropout(share, seed=0):
    """A tamper function that drops each client's replies with a fixed probability, reproducibly."""
    num_requests = {}

    def tamper(reply):
        if reply.metadata.message_type != "train":
            return [reply]
        user = reply.metadata.src_node_id - FIRST_NODE
        round = num_requests[user] = num_requests.get(user, 0) + 1
        return [reply] if numpy_generator(seed, "drop", round, user).random() >= share else []

    return tamper


@pytest.mark.slow
def test_training_tolerates_dropouts(small):
    run = small("fedbn", rounds=6, scenario="digits8", batch_size=64)
    plain = run_with(run)
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
        drop = reply.metadata.message_type == "train" and len(rounds) == 1 and not is_victims(reply)
        return [] if drop else [reply]

    message = r"2 of 3 clients failed, more than the tolerated share of 0.3.* user \d: no reply"
    with pytest.raises(ClientError, match=message):
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
        run_with(run)


def test_late_reply_counts_as_failure(small):
    run = small("fedbn", rounds=1, tolerate=0.4)

    class Slow(Faulty):
        """A grid on which the victim's training takes a minute."""

        def send_and_receive(self, messages, *, timeout=None):
            self.tamper = drop_reply if timeout < 60 else unchanged
            return super().send_and_receive(messages)

    def slow(timeout):
        return run_on(Slow(run), run, timeout).failures

    assert slow(REPLY_SECONDS) == slow(90) == []
    assert slow(30) == [ClientFailure(1, "train, user 3: no reply within 30 s")]


# Restarted nodes -----------------------------------------------------------------------------------------


class Restarting(Faulty):
    """A grid on which the victim's node loses its memory before the last round."""

    def __init__(self, run, folder=None, damage_files=lambda folder: None):
        super().__init__(run)
        self.folder, self.damage_files = folder, damage_files
        self.set_state_dir()

    def set_state_dir(self):
        if self.folder:
            self.context(NODE).node_config["state-dir"] = str(self.folder)

    def delivered(self, messages):
        if self.round == 3 and self.is_training:
            del self.contexts[NODE]
            self.damage_files(self.folder)
            self.set_state_dir()
        return messages


def test_restarted_node_with_state_dir_resumes(tmp_path, small):
    run = small("fedbn", rounds=3, optimizer_state="keep", momentum=0.9)
    clean = run_with(run)
    outcome = run_on(Restarting(run, tmp_path), run)
    assert equal(outcome, clean)
    assert outcome.failures == []
    (file,) = tmp_path.iterdir()
    assert file.name == f"run-1-user-{VICTIM}.safetensors"


def truncate(data):
    return data[: len(data) // 2]


def flip_bit(data):
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def rewrite_file(folder, change):
    (file,) = folder.iterdir()
    file.write_bytes(change(file.read_bytes()))


LOSSES = {
    "no directory": None,
    "file gone": lambda folder: [file.unlink() for file in folder.iterdir()],
    "a bit changed": lambda folder: rewrite_file(folder, flip_bit),
    "truncated": lambda folder: rewrite_file(folder, lambda data: data[:200]),
    "another run's": lambda folder: rewrite_file(folder, lambda data: data.replace(b'run\\": 1', b'run\\": 2')),
    "no header": lambda folder: [save_file({"x": torch.ones(1)}, file) for file in folder.iterdir()],
}


@pytest.mark.parametrize("loss", mostly_slow(LOSSES, "file gone", "truncated"))
def test_lost_client_state_is_recorded(loss, tmp_path, small):
    run = small("fedbn", rounds=3)
    clean = run_with(run)
    outcome = run_on(Restarting(run, tmp_path, LOSSES[loss]), run) if LOSSES[loss] else run_on(Restarting(run), run)
    assert outcome.failures == [
        ClientFailure(3, "train, user 3: the node had lost its client state and continued as a new client")
    ]
    assert not equal(outcome, clean)


def test_restart_without_client_state_is_not_recorded(small):
    run = small("global-naive", rounds=3)
    outcome = run_on(Restarting(run), run)
    assert outcome.failures == []
    assert equal(outcome, run_with(run))


def test_client_state_of_other_owner_is_ignored(tmp_path):
    owner = {"version": persistence.FORMAT_VERSION, "run": 7, "user": 3}
    persistence.write_states(
        tmp_path / "f",
        owner,
        {2: {"client-state-3": {"w": torch.ones(2)}}, 5: {"client-state-3": {"w": torch.zeros(2)}}},
    )
    rounds = persistence.read_states(tmp_path / "f", owner)
    assert {n: records["client-state-3"]["w"].tolist() for n, records in rounds.items()} == {2: [1, 1], 5: [0, 0]}
    for other in ({"run": 8}, {"user": 4}, {"version": 1}):
        assert persistence.read_states(tmp_path / "f", owner | other) == {}


def test_node_pool_finds_node_with_new_id(small):
    run = small("fedbn", rounds=3, tolerate=0.4)

    class Moving(Faulty):
        """The victim's node is unreachable in round 2; afterwards another node serves that user."""

        moved = False

        def get_node_ids(self):
            return [5 if n == NODE and self.moved else n for n in super().get_node_ids()]

        def context(self, node):
            return super().context(NODE if node == 5 else node)

        def delivered(self, messages):
            self.moved = self.round >= 2
            return [m for m in messages if not (self.moved and m.metadata.dst_node_id == NODE)]

    outcome = run_on(Moving(run), run)
    assert [f.round for f in outcome.failures] == [2]
    assert VICTIM in outcome.scores


# Servers that are killed ---------------------------------------------------------------------------------------------


class Killed(Exception):
    """Simulates the end of a process."""


class Killing(Faulty):
    """The nodes of a deployment whose server is killed during a round, after some nodes have trained."""

    def __init__(self, run, directory, at=None, run_id=1, out="out.safetensors"):
        super().__init__(run, run_id=run_id, out=str(directory / out), **SIMULATION_CONFIG)
        self.directory, self.at = directory, at

    def context(self, node):
        context = super().context(node)
        context.node_config["state-dir"] = str(self.directory / "states")
        return context

    def delivered(self, messages):
        if self.round == self.at and self.is_training:
            InProcessGrid.send_and_receive(self, messages[::2])
            raise Killed
        return messages


def submit(run, grid):
    """Run the ServerApp as Flower does, until the run ends or is killed."""
    context = Context(grid.run.run_id, 1, {}, RecordDict(), grid.run_config)
    with task_identity(grid.run.run_id):
        server_app(grid, context)
    return load_outcome(grid.run_config["out"], run)


@pytest.mark.parametrize(
    ("strategy", "clients"), mostly_slow([("fedbn", None), ("silobn", 2), ("global-recalibrated", 2)], ("silobn", 2))
)
def test_resubmitted_run_resumes_after_server_kill(strategy, clients, small, tmp_path):
    run = small(strategy, rounds=4, optimizer_state="keep", momentum=0.5, clients_per_round=clients, eval_every=2)
    expected = run_with(run)
    for at, run_id in ((1, 11), (3, 12), (2, 13)):  # killed in round 1, in round 3, and in the second round after that
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
    assert equal(resumed, run_with(run))
    (failure,) = resumed.failures
    assert "resumed from the previous checkpoint" in failure.text


def test_training_without_reply_has_no_effect(small, tmp_path):
    """If a node is killed after writing its state but before its reply, the next round uses the state before."""
    run = small("fedbn", rounds=3, tolerate=0.4, optimizer_state="keep", momentum=0.5)

    grid, other = Killing(run, tmp_path / "without_reply"), Killing(run, tmp_path / "not_sampled")
    grid.tamper = lambda reply: drop_reply(reply) if grid.round == 2 else [reply]
    other.delivered = lambda messages: [
        m for m in messages if not (other.round == 2 and other.is_training and m.metadata.dst_node_id == NODE)
    ]
    without_reply, not_sampled = submit(run, grid), submit(run, other)
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
    submit(run, Killing(run, tmp_path, out="another.safetensors"))
    assert len({p.name for p in (tmp_path / "states").iterdir()}) == 2 * len(names)


def test_output_file_of_other_run_is_not_overwritten(small, tmp_path):
    run, other = small("fedbn", rounds=1), small("silobn", rounds=1)
    submit(run, Killing(run, tmp_path))
    with pytest.raises(UserError, match="belongs to another run; delete it or choose another"):
        submit(other, Killing(other, tmp_path))


# Disks and checkpoints -----------------------------------------------------------------------------------------------


def run_until_killed(run, directory):
    """Kill a run after three rounds. Returns the path of its checkpoint."""

    def report(event):
        if event.round == 3:
            raise Killed

    with pytest.raises(Killed):
        run_task(Task(run, str(directory)), "grid", report)
    return directory / CHECKPOINT


def run_to_end(run, directory):
    run_task(Task(run, str(directory)), "grid", lambda event: None)
    return load_outcome(directory / CHECKPOINT, run)


def equal(a, b):
    return same(a.server.state, b.server.state) and (a.curve, a.scores) == (b.curve, b.scores)


DAMAGE = {
    "truncate": truncate,
    "bit": flip_bit,
    "header": lambda data: data.replace(b'round\\": 1', b'round\\": 7'),
    "empty": lambda data: b"",
    "gone": None,
}


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory):
    """An uninterrupted run and its outcome."""
    plan = plan_for("digits8", rounds=4, eval_every=2, global_test=20, batch_size=256)
    run = Run(SCENARIO, "fedbn", plan=plan).resolved()
    return run, run_to_end(run, tmp_path_factory.mktemp("complete") / "runs" / "x")


@pytest.mark.parametrize("damage", mostly_slow(DAMAGE, "bit", "gone"))
def test_damaged_checkpoint_falls_back_to_previous(damage, tmp_path, complete_run):
    run, expected = complete_run
    path = run_until_killed(run, tmp_path / "runs" / "x")
    if DAMAGE[damage] is None:
        path.unlink()
    else:
        damaged = DAMAGE[damage](path.read_bytes())
        assert damaged != path.read_bytes()
        path.write_bytes(damaged)
    resumed = run_to_end(run, path.parent)
    assert equal(resumed, expected)
    assert same(resumed.client_states[VICTIM], expected.client_states[VICTIM])
    (failure,) = resumed.failures
    assert failure.round == 3
    assert re.match(r"checkpoint .* cannot be read \(.*\); resumed from the previous checkpoint", failure.text)
    assert "resumed from the previous checkpoint" in (path.parent / "result.json").read_text()
    assert not previous_checkpoint(path).exists()


def test_load_latest_replaces_damaged_checkpoint(tmp_path, small):
    run = small("fedbn", rounds=4)
    path = run_until_killed(run, tmp_path / "runs" / "x")
    path.write_bytes(b"")
    load_latest(path, run)
    assert len(load_outcome(path, run).curve) == 2
    assert not previous_checkpoint(path).exists()


def test_two_damaged_checkpoints_are_an_error(tmp_path, small):
    run = small("fedbn", rounds=4)
    path = run_until_killed(run, tmp_path / "runs" / "x")
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


def test_checkpoint_writer_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    release, written = threading.Event(), []
    monkeypatch.setattr(checkpoints, "write_atomically", lambda p, *_: release.wait(10) and written.append(p.name))
    with CheckpointWriter() as first, CheckpointWriter() as second:
        first.write(tmp_path / "a", b"")
        second.write(tmp_path / "b", b"")
        assert written == []
        release.set()
        first.write(tmp_path / "c", b"")
        assert written[0] == "a"
    assert written == ["a", "b", "c"]


def test_checkpoint_writer_reports_a_full_disk_but_does_not_hide_an_interruption(tmp_path):
    (tmp_path / "file").touch()
    writer = CheckpointWriter()
    writer.write(tmp_path / "file" / "x", b"")
    with pytest.raises(UserError, match="cannot write .*x"):
        writer.write(tmp_path / "y", b"")
    with pytest.raises(UserError, match="cannot write"), writer:
        writer.write(tmp_path / "file" / "x", b"")
    writer.write(tmp_path / "file" / "x", b"")
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt


def test_failures_round_trip_through_checkpoint(tmp_path, small):
    run = small("fedbn", rounds=1)
    outcome = federate(run)
    outcome.failures.append(ClientFailure(1, "train, user 3: no reply"))
    save_outcome(tmp_path / "c", run, outcome)
    assert load_outcome(tmp_path / "c", run).failures == outcome.failures
