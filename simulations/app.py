"""The ServerApp: rounds of training, statistics settled, the evaluation matrix; the same under every engine.

Replies are put in the order of their users before anything is summed, so a run does not depend on who answers
first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

from clients.config import run_from_config
from clients.npy import Held
from clients.records import answers_to, arrays, registry_to, scores_from, set_threads
from fedbn.errors import UserError
from fedbn.evaluation import COLUMNS, Score
from fedbn.federation import (
    Fault,
    Outcome,
    Point,
    Server,
    counting,
    evaluated,
    global_columns,
    hold,
    mean_accuracy,
    mean_loss,
    served,
    settled,
)
from fedbn.moments import Moments
from fedbn.roles import State
from fedbn.run import Run
from fedbn.setting import EVERYONE, Setting, setting
from fedbn.strategy import Update
from simulations.admission import admitted_moments, admitted_update
from simulations.grid import InProcessGrid
from simulations.server_optimizer import server_step
from simulations.store import before, load_latest, save_outcome

app = ServerApp()


T = TypeVar("T")


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
    """Conduct the run that the run-config describes, or what is left of it.

    With ``out`` in the run-config, that file holds the run as far as it has got, after every round; the same run with
    the same file goes on from there.
    """
    set_threads()
    run = run_from_config(context.run_config)
    out = str(context.run_config.get("out", ""))
    listener = _checkpoints(Path(out), run) if out else _listener.get()
    if not (out and listener and listener.resume and listener.resume.scores):
        conduct(grid, run, listener, float(context.run_config.get("patience", 0)))


def _checkpoints(path: Path, run: Run) -> Listener:
    sources = setting(run).population.sources
    return Listener(
        resume=load_latest(path, run, sources),
        on_round=lambda number, outcome: save_outcome(path, run, outcome, sources, before(path)),
        on_end=lambda outcome: before(path).unlink(missing_ok=True),
    )


class Clients:
    """The nodes of a grid, addressed by the user they serve.

    Attributes:
        grid: reaches them.
        users: how many there are.
        tolerate: share of those asked that may fail.
        patience: seconds after which a client that was asked has failed; 0: never.
        survived: what went wrong so far and was survived.
        trained: the last round of each user whose training counted.
        node: user -> node id.

    Raises:
        UserError: the grid has fewer nodes than there are users.
        ClientError: a node answers with an error.
    """

    def __init__(self, grid: Grid, users: int, tolerate: float = 0.0, patience: float = 0.0) -> None:
        """Ask every node which user it serves, until all users have one."""
        self.grid, self.users, self.tolerate, self.patience = grid, users, tolerate, patience
        self.survived: list[str] = []
        self.node: dict[int, int] = {}
        self.trained: dict[int, int] = {}
        while missing := set(range(users)) - self.node.keys():
            self._meet()
            if missing - self.node.keys():
                time.sleep(0.5)

    def _meet(self) -> None:
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
        return self.grid.send_and_receive(messages, timeout=self.patience or None)

    def record(self, state: State) -> ArrayRecord:
        """Tensors as the nodes can take them: by reference where they are in this process."""
        return Held(state) if isinstance(self.grid, InProcessGrid) else arrays(state)

    def ask(self, kind: str, content: Mapping[int, RecordDict], read: Callable[[int, RecordDict], T]) -> dict[int, T]:
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
            self._meet()  # a node that was started anew may have another id
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
                self.survived.append(f"{kind}, {_name(user)}: answered twice; the first answer counts")
            elif reply.has_error():
                failed[user] = ClientError(f"{kind}, {_name(user)}: {reply.error.reason}")
            else:
                try:
                    replies[user] = read(user, reply.content)
                    if "lost" in reply.content:
                        self.survived.append(
                            f"{kind}, {_name(user)}: the node had lost what its user keeps, and went on like a newcomer"
                        )
                except UserError as error:
                    failed[user] = error
                except (KeyError, TypeError, ValueError) as error:
                    failed[user] = ClientError(f"{kind}, {_name(user)}: a reply that cannot be read: {error!r}")
        for user in content.keys() - replies.keys() - failed.keys():
            failed[user] = ClientError(f"{kind}, {_name(user)}: no reply")
        self._survive(kind, failed, len(content))
        return {user: replies[user] for user in content if user in replies}

    def _survive(self, kind: str, failed: Mapping[int, Exception], asked: int) -> None:
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
        self.survived += [_line(failed[user]) for user in sorted(failed)]
        for user in failed:
            self.node.pop(max(user, 0), None)


def _name(user: int) -> str:
    return "everyone" if user == EVERYONE else f"user {user}"


def _line(error: Exception) -> str:
    first, *_ = str(error).splitlines()
    return first


def conduct(grid: Grid, run: Run, listener: Listener | None = None, patience: float = 0.0) -> Outcome:
    """Run a federation over the nodes of a grid.

    The order of operations is that of `fedbn.federation.federate`, and so are the numbers, to the last bit.

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
