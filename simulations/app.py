"""The ServerApp: rounds of training, statistics settled, the evaluation matrix; the same under every engine.

Replies are put in the order of their users before anything is summed, so a run does not depend on who answers
first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

from clients.config import run_from_config
from clients.npy import Held
from clients.records import answers_to, arrays, registry_to, scores_from, set_threads, tensors
from fedbn.errors import UserError
from fedbn.evaluation import COLUMNS, Score
from fedbn.federation import (
    Outcome,
    Point,
    Server,
    evaluated,
    global_columns,
    hold,
    mean_accuracy,
    mean_loss,
    served,
    settled,
)
from fedbn.moments import Moments
from fedbn.recalibration import unflatten
from fedbn.roles import State
from fedbn.run import Run
from fedbn.setting import EVERYONE, Setting, setting
from fedbn.strategy import Update
from simulations.admission import admitted, admitted_notes
from simulations.grid import InProcessGrid
from simulations.server_optimizer import server_step
from simulations.store import save_outcome

app = ServerApp()


class ClientError(RuntimeError):
    """A client answered with an error; the run stops, completed rounds are kept."""


@dataclass(frozen=True)
class Listener:
    """What the caller of an in-process run wants to know, and where it wants to go on from.

    Attributes:
        resume: an unfinished outcome.
        on_round: told after each round.
        on_end: given the finished outcome.
    """

    resume: Outcome | None = None
    on_round: Callable[[int, Outcome], None] | None = None
    on_end: Callable[[Outcome], None] | None = None


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Attach a listener to the runs of this block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Conduct the run that the run-config describes; write it below ``out`` if that is given."""
    set_threads()
    run = run_from_config(context.run_config)
    outcome = conduct(grid, run, _listener.get())
    if out := str(context.run_config.get("out", "")):
        save_outcome(Path(out), run, outcome)


class Clients:
    """The nodes of a grid, addressed by the user they serve.

    Raises:
        UserError: the grid has fewer nodes than there are users.
        ClientError: a node answers with an error.
    """

    def __init__(self, grid: Grid, users: int) -> None:
        """Ask every node which user it serves, until all users have one."""
        self.grid = grid
        self.node: dict[int, int] = {}
        while missing := set(range(users)) - self.node.keys():
            known = set(self.node.values())
            asked = [n for n in grid.get_node_ids() if n not in known]
            for reply in grid.send_and_receive([Message(RecordDict(), n, "query.partition") for n in asked]):
                if reply.has_error():
                    raise ClientError(f"node {reply.metadata.src_node_id}: {reply.error.reason}")
                info = reply.content.config_records["info"]
                nodes = cast(int, info["num-partitions"])
                if 0 < nodes < users:
                    raise UserError(
                        f"a federation of {nodes} nodes cannot serve {users} users, one each: add "
                        f"--federation-config 'num-supernodes={users}' to flwr run"
                    )
                self.node[cast(int, info["partition-id"])] = reply.metadata.src_node_id
            if missing - self.node.keys():
                time.sleep(0.5)

    def record(self, state: State) -> ArrayRecord:
        """Tensors as the nodes can take them: by reference where they are in this process."""
        return Held(state) if isinstance(self.grid, InProcessGrid) else arrays(state)

    def ask(self, kind: str, content: dict[int, RecordDict]) -> dict[int, RecordDict]:
        """Send each user its content; the replies, in the order of the users."""
        user_of = {self.node[max(user, 0)]: user for user in content}
        messages = [Message(record, self.node[max(user, 0)], kind) for user, record in content.items()]
        replies: dict[int, RecordDict] = {}
        for reply in self.grid.send_and_receive(messages):
            user = user_of[reply.metadata.src_node_id]
            if reply.has_error():
                name = "everyone" if user == EVERYONE else f"user {user}"
                raise ClientError(f"{kind}, {name}: {reply.error.reason}")
            replies[user] = reply.content
        if missing := sorted(content.keys() - replies.keys()):
            raise ClientError(f"{kind}: no reply from users {missing}")
        return {user: replies[user] for user in content}


def conduct(grid: Grid, run: Run, listener: Listener | None = None) -> Outcome:
    """Run a federation over the nodes of a grid.

    The order of operations is that of `fedbn.federation.federate`, and so are the numbers, to the last bit.

    Raises:
        UserError: the run cannot work.
        ClientError: a client failed.
    """
    listener = listener or Listener()
    here = setting(run)
    step = server_step(run.plan)
    clients = Clients(grid, len(here.population.users))
    began = time.perf_counter()
    out = listener.resume or Outcome(Server(here.start(), here.start()))
    spent = out.seconds
    for number in range(len(out.curve) + 1, run.plan.rounds + 1):
        sampled = here.sampled(number)
        heard = _consult(here, clients, out.server, number, sampled) if here.strategy.consults else []
        updates = _train(here, clients, out.server, number, sampled, heard)
        out.server.advance(here, updates, number, step)
        if evaluated(here, number) and here.strategy.settles:
            out.server.serving = _settle(here, clients, out.server.state)
        last = number == run.plan.rounds
        scores = _evaluate(here, clients, out.server, last=last) if evaluated(here, number) else {}
        if last:
            out.scores = scores
        point = Point(
            number,
            mean_loss(updates),
            mean_accuracy(here, scores, unseen=False),
            mean_accuracy(here, scores, unseen=True),
        )
        out.curve.append(point)
        out.seconds = spent + time.perf_counter() - began
        if listener.on_round:
            listener.on_round(number, out)
    if listener.on_end:
        listener.on_end(out)
    return out


def _outgoing(
    here: Setting, clients: Clients, server: Server, users: Sequence[int], *, serving: bool = False
) -> dict[int, ArrayRecord]:
    """What each user is sent; users of one view share one record."""
    records: dict[str, ArrayRecord] = {}
    for user in users:
        if (view := here.view(user)) not in records:
            records[view] = clients.record(server.sends(here, user, serving=serving))
    return {user: records[here.view(user)] for user in users}


def _config(here: Setting, number: int, met: bool = False) -> ConfigRecord:
    return ConfigRecord({"round": number, "rounds": here.run.plan.rounds, "met": met})


def _consult(
    here: Setting, clients: Clients, server: Server, number: int, sampled: Sequence[int]
) -> list[dict[str, Moments]]:
    outgoing = _outgoing(here, clients, server, sampled)

    def ask(answers: list[dict[str, Moments]]) -> list[dict[str, Moments] | None]:
        heard, config = answers_to(answers), _config(here, number)
        content = {u: RecordDict({"arrays": outgoing[u], "config": config, **heard}) for u in sampled}
        return _said(clients.ask("query.consult", content))

    return list(hold(ask))


def _train(
    here: Setting,
    clients: Clients,
    server: Server,
    number: int,
    sampled: Sequence[int],
    heard: list[dict[str, Moments]],
) -> list[Update]:
    outgoing = _outgoing(here, clients, server, sampled)
    common = answers_to(heard)
    if server.told:
        common["told"] = clients.record(server.told)

    contents: dict[tuple[str, bool], RecordDict] = {}  # users that are told the same share it

    def content(user: int) -> RecordDict:
        which = here.view(user), here.strategy.met(user, server.known)
        if which not in contents:
            contents[which] = RecordDict(
                {"arrays": outgoing[user], "config": _config(here, number, which[1]), **common}
            )
        return contents[which]

    replies = clients.ask("train", {u: content(u) for u in sampled})
    updates = []
    for user, reply in replies.items():
        metrics, notes = cast(MetricRecord, reply["metrics"]), cast(ArrayRecord | None, reply.get("notes"))
        updates.append(
            Update(
                user,
                admitted(here, user, cast(ArrayRecord, reply["arrays"])),
                cast(int, metrics["num-examples"]),
                cast(float, metrics["loss"]),
                {} if notes is None else admitted_notes(here, user, notes),
            )
        )
    return updates


def _settle(here: Setting, clients: Clients, state: State) -> State:
    record = clients.record(state)

    def ask(answers: list[dict[str, Moments]]) -> list[dict[str, Moments] | None]:
        content = RecordDict({"arrays": record, **answers_to(answers)})
        return _said(clients.ask("query.settle", dict.fromkeys(here.trainers, content)))

    return settled(here, state, list(hold(ask)))


def _said(replies: dict[int, RecordDict]) -> list[dict[str, Moments] | None]:
    return [_moments(content.array_records["moments"]) or None for content in replies.values()]


def _moments(record: ArrayRecord) -> dict[str, Moments]:
    return unflatten(tensors(record))


def _evaluate(here: Setting, clients: Clients, server: Server, *, last: bool) -> dict[int, list[Score]]:
    users = served(here)
    outgoing = _outgoing(here, clients, server, users, serving=True)
    registry = registry_to(server.registry) if last and server.registry else None

    def content(user: int) -> RecordDict:
        globally = global_columns(here, user) if last else ()
        columns = COLUMNS if last else COLUMNS[:1]
        config = ConfigRecord({"columns": [str(c) for c in columns], "globally": [str(c) for c in globally]})
        records = RecordDict({"arrays": outgoing[user], "config": config})
        if registry is not None and here.hears_registry(user):
            records["registry"] = registry
        return records

    replies = clients.ask("evaluate", {user: content(user) for user in users})
    return {user: scores_from(cast(MetricRecord, content["metrics"])) for user, content in replies.items()}
