"""Faults of clients, disks and checkpoints: a run goes on where that was allowed, or stops with a clear error."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace

import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from safetensors.torch import save_file

from clients import persistence as keeping
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
from simulations.storage.checkpoint import before, load_latest, load_outcome, save_outcome
from tests.helpers import same

VICTIM = 3


SCENARIO = "digits8:users=4:unseen=1"


@pytest.fixture
def small():
    """A function giving a run of few steps: it is not the learning that is tested here."""

    def make(strategy="global-naive", *, rounds=2, scenario=SCENARIO, **settings):
        values = {"batch_size": 256, "eval_every": rounds, "global_test": 20} | settings
        return Run(scenario, strategy, plan=plan_for(scenario, rounds=rounds, **values)).resolved()

    return make


class Faulty(InProcessGrid):
    """A grid whose replies somebody changes on their way."""

    def __init__(self, run, tamper, app=client_app):
        super().__init__(app, len(build_context(run).population.users), {"run": run.to_json()})
        self.tamper = tamper

    def send_and_receive(self, messages, *, timeout=None):
        return [late for reply in super().send_and_receive(messages) for late in self.tamper(reply)]


def run_with(run, tamper, app=client_app, **listener):
    with task_identity(1):
        return run_rounds(Faulty(run, tamper, app), run, Listener(**listener))


def kind(reply):
    return reply.metadata.message_type


def user(reply):
    return reply.metadata.src_node_id - 1_000_000


def changed(change, what="train"):
    """Tamper with the victim's replies of one kind by changing their content."""

    def tamper(reply):
        if kind(reply) == what and user(reply) == VICTIM:
            change(reply.content)
        return [reply]

    return tamper


def entries(change):
    """Change the victim's tensors."""

    def apply(content):
        state = {k: v.clone() for k, v in tensors(content["arrays"]).items()}
        change(state)
        content["arrays"] = arrays(state)

    return changed(apply)


def first_float(value):
    def change(state):
        name = next(k for k, v in state.items() if v.is_floating_point())
        state[name].view(-1)[0] = value

    return change


def reshaped(state):
    name = next(k for k, v in state.items() if v.dim() > 1)
    state[name] = state[name].flatten()


def lost(reply):
    return [] if kind(reply) == "train" and user(reply) == VICTIM else [reply]


def raising(message, context):
    if context.node_config["partition-id"] == VICTIM and message.metadata.message_type == "train":
        raise ZeroDivisionError("a bug at a client")
    return client_app(message, context)


def intact(reply):
    return [reply]


def from_the_link(reply):
    """As a SuperLink answers for a node that is gone."""
    if reply.has_error():
        reply.metadata.__dict__["_src_node_id"] = 1
    return [reply]


FAULTS = {
    "raises": (intact, raising, ClientError, "train, user 3: ZeroDivisionError: a bug at a client"),
    "node gone": (from_the_link, raising, ClientError, "train, user 3: ZeroDivisionError"),
    "no reply": (lost, client_app, ClientError, "train, user 3: no reply"),
    "NaN": (entries(first_float(float("nan"))), client_app, InvalidReply, "client 3 sent NaN or Inf in"),
    "Inf": (entries(first_float(float("inf"))), client_app, InvalidReply, "client 3 sent NaN or Inf in"),
    "shape": (entries(reshaped), client_app, InvalidReply, r"client 3 sent .* expected torch.float32 \["),
    "entry missing": (entries(lambda s: s.popitem()), client_app, InvalidReply, "too many or too few"),
    "entry too many": (entries(lambda s: s.update(x=torch.ones(1))), client_app, InvalidReply, "entries x too many"),
    "no arrays": (
        changed(lambda c: c.pop("arrays")),
        client_app,
        InvalidReply,
        "client 3 sent no arrays or no metrics",
    ),
    "no loss": (changed(lambda c: c["metrics"].pop("loss")), client_app, InvalidReply, "its loss is None"),
    "no rows": (
        changed(lambda c: c["metrics"].update({"num-examples": 0})),
        client_app,
        InvalidReply,
        "client 3 says that it trained on 0 examples",
    ),
    "scores unreadable": (
        changed(lambda c: c.update(metrics=MetricRecord({"own": 1.0})), "evaluate"),
        client_app,
        ClientError,
        "evaluate, user 3: a reply that cannot be read: ValueError",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_client_stops_the_run_and_names_client_and_cause(name, small):
    tamper, app, error, message = FAULTS[name]
    with pytest.raises(error, match=message):
        run_with(small("silobn"), tamper, app)


@pytest.mark.parametrize("name", FAULTS)
def test_a_tolerated_fault_leaves_out_that_client_and_is_told(name, small):
    tamper, app, _, message = FAULTS[name]
    seen = len(build_context(small()).population.seen)
    outcome = run_with(small("silobn", tolerate=1 / seen, eval_every=1), tamper, app)
    assert len(outcome.curve) == 2
    assert [f.round for f in outcome.failures] == [1, 2]
    assert all(re.search(message, f.text) and "\n" not in f.text for f in outcome.failures)
    assert outcome.notices()[0].startswith("2 faults were survived; the first, in round 1: ")
    assert (VICTIM in outcome.scores) is (name != "scores unreadable")
    assert all(torch.isfinite(v).all() for v in outcome.server.state.values())


def test_those_who_answered_are_what_the_round_is_made_of(small, monkeypatch):
    """Leaving out a client whose reply is lost gives the bits of a round for which it was not drawn."""
    run = small("silobn", rounds=1, tolerate=0.4)
    outcome = run_with(run, lost)
    ctx = build_context(run)
    others = [u for u in ctx.population.seen if u != VICTIM]
    assert VICTIM in ctx.population.seen
    monkeypatch.setattr(type(ctx), "sampled", lambda self, round: others)
    assert same(outcome.server.state, federate(run).server.state)


def test_a_second_answer_of_a_client_changes_nothing(small):
    run = small("silobn")
    clean = run_with(run, intact)

    def twice(reply):
        if kind(reply) != "train" or user(reply) != VICTIM:
            return [reply]
        again = {k: v * 3 for k, v in tensors(reply.content["arrays"]).items()}
        content = RecordDict({"arrays": arrays(again), "metrics": reply.content["metrics"]})
        other = Message(content, reply_to=request(reply))
        return [reply, other]

    outcome = run_with(run, twice)
    assert same(outcome.server.state, clean.server.state)
    assert outcome.scores == clean.scores
    assert clean.failures == clean.notices() == []
    assert outcome.failures == [
        ClientFailure(n, "train, user 3: answered twice; the first answer counts") for n in (1, 2)
    ]


def request(reply):
    """A message that such a reply could answer."""
    message = Message(RecordDict(), reply.metadata.src_node_id, "train")
    message.metadata._dst_node_id = reply.metadata.src_node_id
    return message


@pytest.mark.parametrize("name", ["global-recalibrated", "fedtan"])
def test_nonsense_in_a_conversation_about_statistics_is_not_let_in(name, small):
    def poisoned(reply):
        if kind(reply).startswith("query") and "moments" in reply.content and user(reply) == VICTIM:
            said = {k: v * float("nan") for k, v in tensors(reply.content["moments"]).items()}
            reply.content["moments"] = arrays(said)
        return [reply]

    run = small(name, rounds=1)
    with pytest.raises(InvalidReply, match="client 3 sent NaN or Inf in"):
        run_with(run, poisoned)
    tolerant = replace(run, plan=replace(run.plan, tolerate=0.4))
    outcome = run_with(tolerant, poisoned)
    assert outcome.failures
    assert all(torch.isfinite(v).all() for v in outcome.server.serving.values())


def dropping(share, seed=0):
    """A fault hook by which each client drops a round with this probability, the same in every life of a run."""
    asked = {}

    def tamper(reply):
        if kind(reply) != "train":
            return [reply]
        round = asked[user(reply)] = asked.get(user(reply), 0) + 1
        return [reply] if numpy_generator(seed, "drop", round, user(reply)).random() >= share else []

    return tamper


def test_training_goes_on_while_three_of_ten_clients_drop_each_round(small):
    run = small("fedbn", rounds=6, scenario="digits8", batch_size=64)
    plain = run_with(run, intact)
    tolerant = replace(run, plan=replace(run.plan, tolerate=0.9))
    outcome = run_with(tolerant, dropping(0.3))
    seen = len(build_context(run).population.seen)
    assert 0.15 < len(outcome.failures) / (6 * seen) < 0.45
    assert outcome.curve[-1].train_loss < outcome.curve[0].train_loss
    assert outcome.curve[-1].own > plain.curve[-1].own - 0.15


def test_more_failures_than_tolerated_stop_the_run_and_keep_the_rounds_before(small):
    run = small("fedbn", rounds=3, tolerate=0.3)
    rounds = []

    def all_but_one(reply):
        gone = kind(reply) == "train" and len(rounds) == 1 and user(reply) != VICTIM
        return [] if gone else [reply]

    with pytest.raises(ClientError, match=r"2 of 3 clients failed, more than the share of 0.3 .* user \d: no reply"):
        run_with(run, all_but_one, on_round=lambda number, outcome: rounds.append(number))
    assert rounds == [1]


@pytest.mark.parametrize(
    ("value", "message"), [(1.0, "tolerate must be below 1"), (-0.1, "tolerate must be at least 0")]
)
def test_a_share_that_makes_no_sense(value, message):
    with pytest.raises(UserError, match=message):
        plan_for("digits8", tolerate=value)


def test_secure_sums_tolerate_nobody():
    plan = plan_for("digits8", rounds=1, tolerate=0.3)
    run = Run("digits8", "fedbn", plan=plan, privacy="secure=true").resolved()
    with pytest.raises(UserError, match="secure sums need every client of a round"):
        run_with(run, intact)


def test_whoever_does_not_answer_in_time_has_failed(small):
    run = small("fedbn", rounds=1, tolerate=0.4)

    class Slow(InProcessGrid):
        """A grid on which the victim trains for a minute."""

        def send_and_receive(self, messages, *, timeout=None):
            replies = super().send_and_receive(messages)
            late = timeout is not None and timeout < 60
            return [r for r in replies if not (late and kind(r) == "train" and user(r) == VICTIM)]

    def slow(timeout):
        with task_identity(1):
            grid = Slow(client_app, 4, {"run": run.to_json()})
            return run_rounds(grid, run, timeout=timeout).failures

    assert slow(0) == slow(90) == []
    assert slow(30) == [ClientFailure(1, "train, user 3: no reply")]


# Nodes that are started anew -----------------------------------------------------------------------------------------


class Restarting(Faulty):
    """A grid on which the victim's node loses its memory before the last round."""

    def __init__(self, run, folder=None, spoil=lambda folder: None):
        super().__init__(run, intact)
        self.folder, self.spoil, self.rounds = folder, spoil, 0
        self.put()

    def put(self):
        context = self.partition_context(VICTIM)
        if self.folder:
            context.node_config["state-dir"] = str(self.folder)

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.rounds += kind(messages[0]) == "train"
        if self.rounds == 3 and kind(messages[0]) == "train":
            del self.contexts[1_000_000 + VICTIM]
            self.spoil(self.folder)
            self.put()
        return super().send_and_receive(messages)


def restarted(run, *rest):
    with task_identity(1):
        return run_rounds(Restarting(run, *rest), run, Listener())


def test_a_node_with_a_state_directory_goes_on_as_if_it_had_never_stopped(tmp_path, small):
    run = small("fedbn", rounds=3, optimizer_state="keep", momentum=0.9)
    clean = run_with(run, intact)
    outcome = restarted(run, tmp_path)
    assert equal(outcome, clean)
    assert outcome.failures == []
    (file,) = tmp_path.iterdir()
    assert file.name == f"run-1-user-{VICTIM}.safetensors"


def rewritten(folder, change):
    (file,) = folder.iterdir()
    file.write_bytes(change(file.read_bytes()))


LOSSES = {
    "no directory": None,
    "file gone": lambda folder: [file.unlink() for file in folder.iterdir()],
    "a bit changed": lambda folder: rewritten(folder, lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]),
    "cut": lambda folder: rewritten(folder, lambda data: data[:200]),
    "another run's": lambda folder: rewritten(folder, lambda data: data.replace(b'run\\": 1', b'run\\": 2')),
    "no header": lambda folder: [save_file({"x": torch.ones(1)}, file) for file in folder.iterdir()],
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_node_that_lost_what_its_user_keeps_is_told_of_and_goes_on_like_a_newcomer(loss, tmp_path, small):
    run = small("fedbn", rounds=3)
    clean = run_with(run, intact)
    outcome = restarted(run, tmp_path, LOSSES[loss]) if LOSSES[loss] else restarted(run)
    assert outcome.failures == [
        ClientFailure(3, "train, user 3: the node had lost what its user keeps, and went on like a newcomer")
    ]
    assert not equal(outcome, clean)


def test_nothing_is_lost_where_nothing_is_kept(small):
    run = small("global-naive", rounds=3)
    outcome = restarted(run)
    assert outcome.failures == []
    assert equal(outcome, run_with(run, intact))


def test_a_file_of_another_run_or_user_is_not_taken(tmp_path):
    owner = {"version": keeping.VERSION, "run": 7, "user": 3}
    keeping._write(
        tmp_path / "f",
        owner,
        {2: {"client-state-3": {"w": torch.ones(2)}}, 5: {"client-state-3": {"w": torch.zeros(2)}}},
    )
    rounds = keeping._read(tmp_path / "f", owner)
    assert {n: records["client-state-3"]["w"].tolist() for n, records in rounds.items()} == {2: [1, 1], 5: [0, 0]}
    for other in ({"run": 8}, {"user": 4}, {"version": 1}):
        assert keeping._read(tmp_path / "f", owner | other) == {}


def test_a_node_that_comes_back_under_another_id_is_found_again(small):
    run = small("fedbn", rounds=3, tolerate=0.4)

    class Moving(Restarting):
        """The victim's node is away in round 2, and then another node serves that user."""

        moved = False

        def get_node_ids(self):
            return [5 if n == 1_000_000 + VICTIM and self.moved else n for n in super().get_node_ids()]

        def context(self, node):
            return super().context(1_000_000 + VICTIM if node == 5 else node)

        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            self.rounds += kind(messages[0]) == "train"
            self.moved = self.rounds >= 2
            there = [m for m in messages if not (self.moved and m.metadata.dst_node_id == 1_000_000 + VICTIM)]
            return InProcessGrid.send_and_receive(self, there)

    with task_identity(1):
        outcome = run_rounds(Moving(run), run, Listener())
    assert [f.round for f in outcome.failures] == [2]
    assert VICTIM in outcome.scores


# Servers that are killed ---------------------------------------------------------------------------------------------


class Killed(Exception):
    """What ends a process here."""


class Killing(InProcessGrid):
    """The nodes of a deployment, of which one or the server is killed in a round, after some of them have trained."""

    def __init__(self, run, place, at=None, run_id=1):
        config = {"run": run.to_json(), "out": str(place / "out.safetensors")}
        super().__init__(client_app, len(build_context(run).population.users), config, run_id=run_id)
        self.place, self.at, self.rounds = place, at, 0

    def context(self, node):
        context = super().context(node)
        context.node_config["state-dir"] = str(self.place / "states")
        return context

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.rounds += kind(messages[0]) == "train"
        if self.rounds == self.at and kind(messages[0]) == "train":
            super().send_and_receive(messages[::2])
            raise Killed
        return super().send_and_receive(messages)


def submitted(run, grid):
    """The run that Flower submits, from beginning to end or to its being killed."""
    context = Context(grid.run.run_id, 1, {}, RecordDict(), grid.run_config)
    with task_identity(grid.run.run_id):
        server_app(grid, context)
    return load_outcome(grid.place / "out.safetensors", run)


@pytest.mark.parametrize(("strategy", "clients"), [("fedbn", None), ("silobn", 2), ("global-recalibrated", 2)])
def test_a_server_killed_in_a_round_goes_on_to_the_same_bits_when_the_run_is_submitted_again(
    strategy, clients, small, tmp_path
):
    run = small(strategy, rounds=4, optimizer_state="keep", momentum=0.5, clients_per_round=clients, eval_every=2)
    unharmed = run_with(run, intact)
    for at, run_id in (
        (1, 11),
        (3, 12),
        (2, 13),
    ):  # in round 1; in round 3; in round 4 of the rest, which is its second
        with pytest.raises(Killed):
            submitted(run, Killing(run, tmp_path, at, run_id))
    resumed = submitted(run, Killing(run, tmp_path, run_id=14))
    assert equal(resumed, unharmed)
    assert resumed.failures == []
    assert resumed.trained == unharmed.trained
    assert [p.name for p in tmp_path.glob("out*")] == ["out.safetensors"]
    untouched = Killing(run, tmp_path, at=1)
    assert equal(submitted(run, untouched), unharmed)
    assert not untouched.contexts


def test_a_server_that_falls_back_a_checkpoint_finds_its_nodes_where_they_were(small, tmp_path):
    run = small("fedbn", rounds=5, eval_every=5)
    with pytest.raises(Killed):
        submitted(run, Killing(run, tmp_path, at=4))
    (tmp_path / "out.safetensors").write_bytes(b"")
    resumed = submitted(run, Killing(run, tmp_path, run_id=2))
    assert equal(resumed, run_with(run, intact))
    (fault,) = resumed.failures
    assert "went on from the checkpoint before" in fault.text


def test_what_a_node_trained_and_could_not_tell_is_as_if_it_had_not_been(small, tmp_path):
    """The victim's node writes its state in round 2 and is killed before it answers: round 3 goes on from round 1."""
    run = small("fedbn", rounds=3, tolerate=0.4, optimizer_state="keep", momentum=0.5)

    class Mute(Killing):
        def send_and_receive(self, messages, *, timeout=None):
            replies = list(super().send_and_receive(messages))
            return [r for r in replies if not (self.rounds == 2 and kind(r) == "train" and user(r) == VICTIM)]

    class Away(Killing):
        def send_and_receive(self, messages, *, timeout=None):
            self.rounds += kind(messages[0]) == "train"
            away = self.rounds == 2 and kind(messages[0]) == "train"
            there = [m for m in messages if not (away and m.metadata.dst_node_id == 1_000_000 + VICTIM)]
            return InProcessGrid.send_and_receive(self, there)

    mute = submitted(run, Mute(run, tmp_path / "mute"))
    away = submitted(run, Away(run, tmp_path / "away"))
    assert equal(mute, away)
    assert mute.trained[VICTIM] == 3


def test_the_same_run_with_another_file_or_started_anew_finds_no_old_states(small, tmp_path):
    run = small("fedbn", rounds=5, eval_every=5)
    first = submitted(run, Killing(run, tmp_path))
    (tmp_path / "out.safetensors").unlink()
    again = submitted(run, Killing(run, tmp_path))
    assert equal(first, again)
    assert again.failures == []
    names = {p.name for p in (tmp_path / "states").iterdir()}
    other = Killing(run, tmp_path)
    other.run_config["out"] = str(tmp_path / "another.safetensors")
    with task_identity(1):
        server_app(other, Context(1, 1, {}, RecordDict(), other.run_config))
    assert len({p.name for p in (tmp_path / "states").iterdir()}) == 2 * len(names)


def test_a_file_of_another_run_is_not_overwritten(small, tmp_path):
    submitted(small("fedbn", rounds=1), Killing(small("fedbn", rounds=1), tmp_path))
    other = small("silobn", rounds=1)
    with pytest.raises(UserError, match="belongs to another run; delete it or choose another"):
        submitted(other, Killing(other, tmp_path))


# Disks and checkpoints -----------------------------------------------------------------------------------------------


def stopped(run, place, rounds, tamper=None):
    """A run killed after some rounds, its checkpoints below ``place``."""

    class Killed(Exception):
        pass

    def report(event):
        if event.round == rounds:
            raise Killed

    with pytest.raises(Killed):
        run_task(Task(run, str(place)), "grid", report)


def finished(run, place):
    run_task(Task(run, str(place)), "grid", lambda event: None)
    return load_outcome(place / CHECKPOINT, run)


def equal(a, b):
    return same(a.server.state, b.server.state) and (a.curve, a.scores) == (b.curve, b.scores)


def cut(data):
    return data[: len(data) // 2]


def flipped(data):
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def renumbered(data):
    return data.replace(b'round\\": 1', b'round\\": 7')


DAMAGE = {"cut": cut, "bit": flipped, "header": renumbered, "empty": lambda data: b"", "gone": None}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to: its value and its outcome."""
    plan = plan_for("digits8", rounds=4, eval_every=2, global_test=20, batch_size=256)
    run = Run(SCENARIO, "fedbn", plan=plan).resolved()
    return run, finished(run, tmp_path_factory.mktemp("whole") / "runs" / "x")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_replaced_by_the_one_before_and_the_end_is_the_same(damage, tmp_path, whole):
    run, unharmed = whole
    place = tmp_path / "runs" / "stopped"
    stopped(run, place, rounds=3)
    path = place / CHECKPOINT
    if DAMAGE[damage] is None:
        path.unlink()
    else:
        spoilt = DAMAGE[damage](path.read_bytes())
        assert spoilt != path.read_bytes()
        path.write_bytes(spoilt)
    resumed = finished(run, place)
    assert equal(resumed, unharmed)
    assert same(resumed.client_states[VICTIM], unharmed.client_states[VICTIM])
    (fault,) = resumed.failures
    assert fault.round == 3
    assert re.match(r"checkpoint .* cannot be read \(.*\); went on from the checkpoint before", fault.text)
    assert "went on from the checkpoint before" in (place / "result.json").read_text()
    assert not before(path).exists()


def test_the_next_round_does_not_move_a_damaged_checkpoint_over_the_sound_one(tmp_path, small):
    run = small("fedbn", rounds=4)
    stopped(run, tmp_path / "runs" / "x", rounds=3)
    path = tmp_path / "runs" / "x" / CHECKPOINT
    path.write_bytes(b"")
    load_latest(path, run)
    assert len(load_outcome(path, run).curve) == 2
    assert not before(path).exists()


def test_two_damaged_checkpoints_are_an_error_that_says_what_to_do(tmp_path, small):
    run = small("fedbn", rounds=4)
    stopped(run, tmp_path / "runs" / "x", rounds=3)
    path = tmp_path / "runs" / "x" / CHECKPOINT
    for each in (path, before(path)):
        each.write_bytes(cut(each.read_bytes()))
    with pytest.raises(UserError, match=r"cannot be read .*: delete it and resume; its run starts anew"):
        finished(run, path.parent)


def test_a_checkpoint_of_other_data_is_no_damage(tmp_path, small):
    run = small("fedbn", rounds=1)
    for _ in range(2):
        save_outcome(tmp_path / "c", run, federate(run), {"data": "abc"}, before(tmp_path / "c"))
    with pytest.raises(UserError, match="was made on other data"):
        load_latest(tmp_path / "c", run, {"data": "abd"})
    assert load_latest(tmp_path / "none", run) is None


def test_a_full_disk_stops_the_run_and_keeps_the_rounds_before(tmp_path, whole, monkeypatch):
    run, unharmed = whole
    place = tmp_path / "runs" / "full"
    count = []

    def full(*anything):
        count.append(1)
        if len(count) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(keeping.os, "fsync", full)
        with pytest.raises(UserError, match="cannot write .*No space left on device; .* or free the disk"):
            finished(run, place)
    assert sorted(p.name for p in place.iterdir()) == [CHECKPOINT, before(place / CHECKPOINT).name]
    assert len(load_outcome(place / CHECKPOINT, run).curve) == 2
    resumed = finished(run, place)
    assert equal(resumed, unharmed)
    assert resumed.failures == []


def test_faults_survive_the_disk(tmp_path, small):
    run = small("fedbn", rounds=1)
    outcome = federate(run)
    outcome.failures.append(ClientFailure(1, "train, user 3: no reply"))
    save_outcome(tmp_path / "c", run, outcome)
    assert load_outcome(tmp_path / "c", run).failures == outcome.failures
