"""A round of federation, as plain functions, and the readable one-process loop made of them.

`client_round`, `client_evaluation` and `client_talk` are what a client does; `Server.advance` and `settled` what
the server does. Flower's apps call the very same functions, so `federate` is the oracle of every engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fedbn.evaluation import COLUMNS, Column, Score, evaluate_user, score
from fedbn.moments import Moments, naive_mean
from fedbn.newcomers import population, starts
from fedbn.online.rule import client_rule
from fedbn.personal import Plain, Work
from fedbn.privacy import protected
from fedbn.privacy_sums import opened
from fedbn.recalibration import replay, statistics_of, union
from fedbn.roles import Role, State, clone
from fedbn.run import Run
from fedbn.seeds import key
from fedbn.setting import EVERYONE, Setting, setting
from fedbn.strategy import SEEDED, Heard, Progress, Update
from fedbn.traffic import Traffic
from fedbn.training import epoch_batches, fit, logits

OPTIMIZER = "optimizer/"
"""Prefix of a client's momentum buffers among the entries it keeps; such entries never travel."""

ASIDE = "aside/"
"""Prefix of what a personalisation method keeps at the client; such entries never travel."""

ServerStep = Callable[[int, State, State, State], tuple[State, State]]
"""How the server moves its parameters: (round, old, mean of the clients', memory) -> (new, memory)."""


@dataclass
class Server:
    """What the server knows between rounds.

    Attributes:
        state: entries that travel.
        serving: the same with statistics that the strategy settled for evaluation.
        memory: what the server's optimiser remembers.
        views: entries in which some clients' states differ from ``state``, by view.
        known: what the strategy remembers for its views.
        told: what the personalisation method tells all clients besides the model.
        registry: the last statistics that each client sent, for newcomers to start from.
    """

    state: State
    serving: State
    memory: State = field(default_factory=dict)
    views: dict[str, State] = field(default_factory=dict)
    known: State = field(default_factory=dict)
    told: State = field(default_factory=dict)
    registry: dict[int, State] = field(default_factory=dict)

    def advance(
        self,
        here: Setting,
        updates: Sequence[Update],
        round: int,
        step: ServerStep | None = None,
    ) -> None:
        """Aggregate: parameters by weighted mean and server step, statistics by the strategy's pool.

        Raises:
            ValueError: no updates.
        """
        if not updates:
            raise ValueError("nothing to aggregate")
        secure = here.privacy is not None and here.privacy.secure
        if secure:
            updates = [opened(here, updates, self.state, round)]
        weights = [here.weight(u.examples) for u in updates]
        table = here.ownership
        statistics = [k for k in table.travels if table.roles[k] is Role.STATISTICS]
        parameters = [k for k in table.travels if table.roles[k] is not Role.STATISTICS]
        new = {k: naive_mean([u.state[k] for u in updates], weights) for k in parameters}
        if step is not None and new:
            new, self.memory = step(round, {k: self.state[k] for k in parameters}, new, self.memory)
        if statistics:
            old = {k: self.state[k] for k in statistics}
            new |= here.strategy.pool(updates, weights, statistics, old, Progress(round, here.run.plan.rounds))
        self.views |= here.strategy.views(updates, weights, table, here.population, self.known)
        self.told = here.personal.tell(updates, self.told, len(here.trainers))
        if not here.strategy.gathers and not secure:
            owned = [k for k in table.travels if table.roles[k] is Role.STATISTICS or table.owner(k) is SEEDED]
            self.registry |= {u.user: {k: u.state[k] for k in owned} for u in updates if owned}
        self.state = {k: new[k] for k in table.travels}
        self.serving = self.state

    def sends(self, here: Setting, user: int, *, serving: bool = False) -> State:
        """The entries that one user is sent, for training or for evaluation."""
        common = self.serving if serving else self.state
        return common | self.views.get(here.view(user), {}) if self.views else common


@dataclass(frozen=True)
class Point:
    """One round on the curve: training loss, and mean accuracies as aggregated where the round was evaluated."""

    round: int
    train_loss: float
    own: float | None = None
    unseen: float | None = None


@dataclass(frozen=True)
class Fault:
    """Something that went wrong in a round and was survived."""

    round: int
    text: str


@dataclass
class Outcome:
    """A finished run.

    Attributes:
        server: final server state.
        kept: what each user that trained keeps, by index.
        curve: one point a round.
        scores: the evaluation matrix's cells by user index.
        seconds: time spent in this process, training and evaluation.
        faults: what was survived.
        traffic: what has travelled besides entries.
        trained: the last round of each user whose training counted.
    """

    server: Server
    kept: dict[int, State] = field(default_factory=dict)
    curve: list[Point] = field(default_factory=list)
    scores: dict[int, list[Score]] = field(default_factory=dict)
    seconds: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)
    trained: dict[int, int] = field(default_factory=dict)

    def notices(self) -> list[str]:
        """What was survived, in a sentence; nothing if nothing was."""
        if not self.faults:
            return []
        first = self.faults[0]
        return [f"{len(self.faults)} faults were survived; the first, in round {first.round}: {first.text}"]


def _split(kept: State | None, here: Setting) -> tuple[State, State, State]:
    """What a client keeps, as (model entries, momentum buffers, a personalisation method's own)."""
    kept = kept or {}
    momentum = {k.removeprefix(OPTIMIZER): v for k, v in kept.items() if k.startswith(OPTIMIZER)}
    aside = {k.removeprefix(ASIDE): v for k, v in kept.items() if k.startswith(ASIDE)}
    return {k: v for k, v in kept.items() if k in here.ownership.roles}, momentum, aside


def _work(here: Setting, user: int, model: nn.Module, progress: Progress, heard: Heard, momentum: State) -> Work:
    plan, data = here.run.plan, here.training_data(user)
    # One place that holds one user's data draws as that user would: then it is the same training.
    drawn = here.population.seen[0] if user == EVERYONE else user
    shared = set(here.ownership.travels)
    received = {n: p.detach().clone() for n, p in model.named_parameters() if n in shared} if plan.proximal else {}

    def begin() -> None:
        here.strategy.begin(model, progress, heard)

    def run_fit(model: nn.Module, **options: Any) -> float:
        main = not options.get("purpose")
        own_hook = options.pop("before_step", None)

        def before_step(trained: nn.Module) -> None:
            if own_hook is not None:
                own_hook(trained)
            here.strategy.before_step(trained)

        loss, buffers = fit(
            model,
            data,
            plan,
            seed=here.run.seed,
            round=progress.round,
            user=drawn,
            pull=options.pop("pull", None) or (plan.proximal, received),
            before_step=before_step,
            optimizer_state=momentum if main else None,
            owners=here.owners_of_rows(user),
            **options,
        )
        if main:
            momentum.update(buffers)
        return loss

    return Work(model, data, plan, progress, here.ownership.roles, run_fit, begin)


def client_round(
    here: Setting,
    user: int,
    received: State,
    kept: State | None,
    progress: Progress,
    heard: Heard = (),
    told: State | None = None,
) -> tuple[Update, State]:
    """One client's round: assemble its model, train it, part what travels from what stays.

    Args:
        here: the run's setting.
        user: index of the client.
        received: the server's entries.
        kept: the client's own, from the last round in which it took part.
        progress: which round.
        heard: the answers of this round's consultation.
        told: what the server tells all clients besides the model.

    Returns:
        The update for the server, and all entries the client keeps for itself.
    """
    own, momentum, aside = _split(kept, here)
    model = here.load(here.assemble(received, own))
    data = here.training_data(user)
    notes = here.strategy.measure(model, data, progress)
    here.strategy.begin(model, progress, heard)
    work = _work(here, user, model, progress, heard, momentum)
    work.heard, work.aside = told or {}, aside
    loss = here.personal.train(work)
    notes |= here.strategy.report(model) | work.notes
    state = clone(model.state_dict())
    travels = {k: state[k] for k in here.ownership.travels}
    stays = {k: state[k] for k in here.ownership.kept}
    stays |= {OPTIMIZER + k: v for k, v in momentum.items()}
    stays |= {ASIDE + k: v for k, v in work.aside.items()}
    return Update(user, travels, len(data), loss, notes), stays


def client_consult(
    here: Setting, user: int, received: State, kept: State | None, progress: Progress, heard: Heard
) -> dict[str, Moments] | None:
    """What one client says next about the first batch of the round that is about to begin; None at the end."""
    own, _, _ = _split(kept, here)
    data = here.training_data(user)
    drawn = here.population.seen[0] if user == EVERYONE else user
    owners = here.owners_of_rows(user)
    first = next(epoch_batches(len(data), here.run.plan, here.run.seed, progress.round, drawn, 0, owners=owners))
    model, batch = here.load(here.assemble(received, own)), data.take(first.to(data.y.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(here.run.seed, "noise", progress.round, drawn))  # dropout as in the step to come
        return here.strategy.consult(model, batch, heard)


def user_state(here: Setting, user: int, received: State, kept: State | None) -> State:
    """A user's whole model after aggregation: assembled, and personalised where the run says so.

    Args:
        here: the run's setting.
        user: index of the user.
        received: the server's entries.
        kept: the user's own.
    """
    own, _, aside = _split(kept, here)
    state = here.assemble(received, own)
    if not isinstance(here.personal, Plain) and user in here.population.seen:
        finished = Progress(here.run.plan.rounds, here.run.plan.rounds)
        model = here.load(state)
        here.strategy.begin(model, finished)
        work = _work(here, user, model, finished, (), {})
        work.aside = aside
        state = here.personal.serve(work)
    return state


def client_evaluation(
    here: Setting,
    user: int,
    received: State,
    kept: State | None,
    *,
    columns: tuple[Column, ...],
    globally: tuple[Column, ...] = (),
    registry: dict[int, State] | None = None,
) -> list[Score]:
    """One user's cells of the evaluation matrix, with its model as assembled after aggregation.

    Args:
        here: the run's setting.
        user: index of the user.
        received: the server's entries.
        kept: the user's own.
        columns: columns to score.
        globally: columns that are also scored on the pooled test rows.
        registry: statistics by client, for rules that start from the population; an unseen user is also scored from
            every start they allow.
    """
    state = user_state(here, user, received, kept)
    return [
        *cells(here, user, state, columns, globally, registry),
        *(newcomer_cells(here, user, state, registry) if registry else ()),
    ]


def cells(
    here: Setting,
    user: int,
    state: State,
    columns: tuple[Column, ...],
    globally: tuple[Column, ...],
    registry: dict[int, State] | None,
) -> list[Score]:
    """A user's cells of some columns, given its whole model (`user_state`); else as `client_evaluation`."""
    person = here.population.users[user]
    return evaluate_user(
        here.scratch,
        state,
        calibration=person.train.x,
        test=person.test,
        unseen=user in here.population.unseen,
        everyone=here.everyone if globally else None,
        columns=columns,
        globally=globally,
        online_prior=here.run.plan.online_prior,
        online_rule=client_rule(here.run.rule) if here.run.rule else None,
        prior=population(here, state, registry, person.train.x) if registry and here.asks_population else None,
        follow=here.strategy.follow,
    )


def newcomer_cells(here: Setting, user: int, state: State, registry: dict[int, State]) -> list[Score]:
    """The cells of an unseen user for every start that other clients' statistics allow; none of a seen one's."""
    if user not in here.population.unseen:
        return []
    person = here.population.users[user]
    return [
        score("unseen", name, logits(here.load(start), person.test.x), person.test.y)
        for name, start in starts(here, state, registry, person.train.x).items()
    ]


def client_talk(
    here: Setting, user: int, received: State, kept: State | None, answers: Sequence[dict[str, Moments]]
) -> dict[str, Moments] | None:
    """What one client says next in settling statistics, after the answers heard so far; None at the end."""
    own, _, _ = _split(kept, here)
    state = here.assemble(received, own)
    x = here.training_data(user).x
    return replay(lambda: here.strategy.settle(here.load(state), x), answers)


def settled(here: Setting, state: State, answers: Sequence[dict[str, Moments]]) -> State:
    """``state`` with its statistics replaced by those that the clients agreed on."""
    model: nn.Module = here.load(here.assemble(state, None))
    here.strategy.adopt(model, answers)
    agreed = clone(statistics_of(model))
    return {k: agreed.get(k, v) for k, v in state.items()}


def evaluated(here: Setting, round: int) -> bool:
    """Whether a round gets a point with accuracies on the curve."""
    return round % here.run.plan.eval_every == 0 or round == here.run.plan.rounds


def global_columns(here: Setting, user: int) -> tuple[Column, ...]:
    """The columns in which a user's model meets the pooled test set in the end.

    As aggregated, every seen user's model does, or one user's where all models are the same.
    """
    if user in here.population.unseen or here.population.remote:  # nobody has all users' test rows
        return ()
    personal = here.ownership.personal or not isinstance(here.personal, Plain) or user == here.population.seen[0]
    return COLUMNS if personal else COLUMNS[1:]


def served(here: Setting) -> list[int]:
    """Users with a model: everybody, except unseen users where no model is shared."""
    lonely = here.treatment.lonely
    return [i for i in range(len(here.population.users)) if not (lonely and i in here.population.unseen)]


def mean_accuracy(here: Setting, scores: dict[int, list[Score]], unseen: bool) -> float | None:
    """Mean over users of own accuracy as aggregated."""
    people = here.population.unseen if unseen else here.population.seen
    values = [
        s.accuracy
        for i in people
        for s in scores.get(i, [])
        if s.column == "aggregated" and s.row == ("unseen" if unseen else "own")
    ]
    return sum(values) / len(values) if values else None


def federate(
    run: Run,
    *,
    here: Setting | None = None,
    step: ServerStep | None = None,
    resume: Outcome | None = None,
    on_round: Callable[[int, Outcome], None] | None = None,
) -> Outcome:
    """Run a whole federation in one process: the readable version, and the oracle of every engine.

    Args:
        run: what to do.
        here: the run made concrete; None: what `setting` makes of it.
        step: the server's step on parameters (None: take the mean).
        resume: an unfinished outcome to go on from.
        on_round: told after each round.

    >>> from fedbn.run import Plan
    >>> run = Run("digits8", "fedbn", plan=Plan(rounds=1, eval_every=1))
    >>> len(federate(run).curve)
    1
    """
    here = here or setting(run)
    began = time.perf_counter()
    out = resume or Outcome(Server(here.start(), here.start()))
    spent = out.seconds
    for number in range(len(out.curve) + 1, run.plan.rounds + 1):
        progress = Progress(number, run.plan.rounds)
        sampled = here.sampled(number)
        heard = list(_consult(here, out, sampled, progress)) if here.strategy.consults else []
        updates = []
        for user in sampled:
            received = out.server.sends(here, user)
            mine = replace(progress, met=here.strategy.met(user, out.server.known))
            update, out.kept[user] = client_round(
                here, user, received, out.kept.get(user), mine, heard, out.server.told
            )
            updates.append(protected(here, update, received, mine))
        out.trained |= dict.fromkeys(sampled, number)
        out.traffic.round(updates, out.server.told, heard)
        out.server.advance(here, updates, number, step)
        if evaluated(here, number) and here.strategy.settles:
            out.server.serving = settled(here, out.server.state, list(_talk(here, out)))
        scores = _evaluate(here, out, last=number == run.plan.rounds) if evaluated(here, number) else {}
        if number == run.plan.rounds:
            out.scores = scores
        out.curve.append(
            Point(
                number,
                mean_loss(updates),
                mean_accuracy(here, scores, unseen=False),
                mean_accuracy(here, scores, unseen=True),
            )
        )
        out.seconds = spent + time.perf_counter() - began
        if on_round:
            on_round(number, out)
    return out


def mean_loss(updates: Sequence[Update]) -> float:
    """Training loss over all examples of a round."""
    total = sum(u.examples for u in updates)
    return sum(u.loss * u.examples for u in updates) / total


def hold(
    ask: Callable[[list[dict[str, Moments]]], Sequence[dict[str, Moments] | None]],
    count: Callable[[Heard, Sequence[dict[str, Moments] | None]], None] = lambda answers, replies: None,
) -> Iterator[dict[str, Moments]]:
    """Hold a conversation: ask all clients, answer with the union of what they say, until one has nothing to say.

    Args:
        ask: what clients say to the answers so far.
        count: told of each exchange (`counting`).
    """
    answers: list[dict[str, Moments]] = []
    while True:
        replies = ask(answers)
        count(answers, replies)
        said = [reply for reply in replies if reply is not None]
        if len(said) < len(replies):
            return
        answers.append(union(said))
        yield answers[-1]


def counting(here: Setting, out: Outcome, purpose: str) -> Callable[[Heard, Sequence[dict[str, Moments] | None]], None]:
    """Counts the exchanges of a conversation for an outcome."""
    return partial(out.traffic.talked, purpose, sum(here.ownership.sizes[k] for k in here.ownership.travels))


def _talk(here: Setting, out: Outcome) -> Iterator[dict[str, Moments]]:
    return hold(
        lambda answers: [client_talk(here, u, out.server.state, out.kept.get(u), answers) for u in here.trainers],
        counting(here, out, "settling"),
    )


def _consult(here: Setting, out: Outcome, sampled: list[int], progress: Progress) -> Iterator[dict[str, Moments]]:
    return hold(
        lambda answers: [
            client_consult(here, u, out.server.sends(here, u), out.kept.get(u), progress, answers) for u in sampled
        ],
        counting(here, out, "consulting"),
    )


def _evaluate(here: Setting, out: Outcome, *, last: bool) -> dict[int, list[Score]]:
    return {
        user: client_evaluation(
            here,
            user,
            out.server.sends(here, user, serving=True),
            out.kept.get(user),
            columns=COLUMNS if last else COLUMNS[:1],
            globally=global_columns(here, user) if last else (),
            registry=out.server.registry if last and here.hears_registry(user) else None,
        )
        for user in served(here)
    }
