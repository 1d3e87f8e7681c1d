"""The rounds of a run over the nodes of a grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp import Grid

from clients.records import answers_to, registry_to, scores_from
from fedbn.errors import UserError
from fedbn.federation.context import Setting
from fedbn.federation.metrics import COLUMNS, Score
from fedbn.federation.run import Run
from fedbn.federation.server import (
    Fault,
    Outcome,
    Point,
    Server,
    counting,
    evaluated,
    global_columns,
    mean_accuracy,
    mean_loss,
    served,
    settled,
)
from fedbn.federation.setup import setting
from fedbn.nn.roles import State
from fedbn.statistics.consensus import hold
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import Update
from simulations.server.nodes import Clients
from simulations.server.optimizer import server_step
from simulations.server.validation import admitted_moments, admitted_update


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


def conduct(grid: Grid, run: Run, listener: Listener | None = None, patience: float = 0.0) -> Outcome:
    """Run a federation over the nodes of a grid.

    The order of operations is that of `fedbn.federation.loop.federate`, and so are the numbers, to the last bit.

    Args:
        grid: reaches the nodes.
        run: what to do.
        listener: who is told, and where to go on from.
        patience: seconds after which a client that was asked has failed; 0: never.

    Raises:
        UserError: the run cannot work.
        ClientError: a client failed.
    """
    listener = listener or Listener()
    here = setting(run)
    step = server_step(run.plan)
    if run.plan.tolerate and here.privacy is not None and here.privacy.secure:
        raise UserError("secure sums need every client of a round: leave out secure=true, or tolerate")
    clients = Clients(grid, len(here.population.users), run.plan.tolerate, patience)
    began = time.perf_counter()
    out = listener.resume or Outcome(Server(here.start(), here.start()))
    clients.trained = out.trained
    spent = out.seconds
    for number in range(len(out.curve) + 1, run.plan.rounds + 1):
        sampled = here.sampled(number)
        heard = _consult(here, clients, out, number, sampled) if here.strategy.consults else []
        updates = _train(here, clients, out.server, number, sampled, heard)
        out.traffic.round(updates, out.server.told, heard)
        out.server.advance(here, updates, number, step)
        if evaluated(here, number) and here.strategy.settles:
            out.server.serving = _settle(here, clients, out)
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
        out.faults += [Fault(number, text) for text in clients.survived]
        clients.survived.clear()
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


def _config(here: Setting, number: int, trained: int, met: bool = False) -> ConfigRecord:
    return ConfigRecord({"round": number, "rounds": here.run.plan.rounds, "met": met, "trained": trained})


def _consult(
    here: Setting, clients: Clients, out: Outcome, number: int, sampled: Sequence[int]
) -> list[dict[str, Moments]]:
    outgoing = _outgoing(here, clients, out.server, sampled)

    def ask(answers: list[dict[str, Moments]]) -> list[dict[str, Moments] | None]:
        heard = answers_to(answers)
        configs = {u: _config(here, number, clients.trained.get(u, 0)) for u in sampled}
        content = {u: RecordDict({"arrays": outgoing[u], "config": configs[u], **heard}) for u in sampled}
        return list(clients.ask("query.consult", content, _said).values())

    return list(hold(ask, counting(here, out, "consulting")))


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

    contents: dict[tuple[str, int, bool], RecordDict] = {}  # users that are told the same share it

    def content(user: int) -> RecordDict:
        which = here.view(user), clients.trained.get(user, 0), here.strategy.met(user, server.known)
        if which not in contents:
            config = _config(here, number, *which[1:])
            contents[which] = RecordDict({"arrays": outgoing[user], "config": config, **common})
        return contents[which]

    def read(user: int, reply: RecordDict) -> Update:
        return admitted_update(here, user, reply)

    updates = clients.ask("train", {u: content(u) for u in sampled}, read)
    clients.trained |= dict.fromkeys(updates, number)
    return list(updates.values())


def _settle(here: Setting, clients: Clients, out: Outcome) -> State:
    record = clients.record(out.server.state)

    def ask(answers: list[dict[str, Moments]]) -> list[dict[str, Moments] | None]:
        heard = answers_to(answers)

        def content(user: int) -> RecordDict:
            config = ConfigRecord({"trained": clients.trained.get(user, 0)})
            return RecordDict({"arrays": record, "config": config, **heard})

        return list(clients.ask("query.settle", {u: content(u) for u in here.trainers}, _said).values())

    return settled(here, out.server.state, list(hold(ask, counting(here, out, "settling"))))


def _said(user: int, reply: RecordDict) -> dict[str, Moments] | None:
    return admitted_moments(user, reply) or None


def _evaluate(here: Setting, clients: Clients, server: Server, *, last: bool) -> dict[int, list[Score]]:
    users = served(here)
    outgoing = _outgoing(here, clients, server, users, serving=True)
    registry = registry_to(server.registry) if last and server.registry else None

    def content(user: int) -> RecordDict:
        globally = global_columns(here, user) if last else ()
        columns = COLUMNS if last else COLUMNS[:1]
        config = ConfigRecord({"columns": [str(c) for c in columns], "globally": [str(c) for c in globally]})
        config["trained"] = clients.trained.get(user, 0)
        records = RecordDict({"arrays": outgoing[user], "config": config})
        if registry is not None and here.hears_registry(user):
            records["registry"] = registry
        return records

    def read(user: int, reply: RecordDict) -> list[Score]:
        return scores_from(cast(MetricRecord, reply["metrics"]))

    return clients.ask("evaluate", {user: content(user) for user in users}, read)
