"""A round of federation, as plain functions, and the readable one-process loop made of them.

`client_round`, `client_evaluation` and `client_talk` are what a client does; `Server.advance` and `settled` what
the server does. Flower's apps call the very same functions, so `federate` is the oracle of every engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from fedbn.evaluation import COLUMNS, Column, Score, evaluate_user
from fedbn.moments import Moments, naive_mean
from fedbn.recalibration import replay, set_statistics, statistics_of, union
from fedbn.roles import Role, State, clone, statistics_layers
from fedbn.run import Run
from fedbn.setting import EVERYONE, Setting, setting
from fedbn.strategy import LOCAL, Progress, Update
from fedbn.training import fit

OPTIMIZER = "optimizer/"
"""Prefix of a client's momentum buffers among the entries it keeps; such entries never travel."""

ServerStep = Callable[[int, State, State, State], tuple[State, State]]
"""How the server moves its parameters: (round, old, mean of the clients', memory) -> (new, memory)."""


@dataclass
class Server:
    """What the server knows between rounds.

    Attributes:
        state: entries that travel.
        serving: the same with statistics that the strategy settled for evaluation.
        memory: what the server's optimiser remembers.
    """

    state: State
    serving: State
    memory: State = field(default_factory=dict)

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
        weights = [here.weight(u.examples) for u in updates]
        travels = here.ownership.travels
        statistics = [k for k in travels if here.ownership.roles[k] is Role.STATISTICS]
        parameters = [k for k in travels if here.ownership.roles[k] is not Role.STATISTICS]
        new = {k: naive_mean([u.state[k] for u in updates], weights) for k in parameters}
        if step is not None and new:
            new, self.memory = step(round, {k: self.state[k] for k in parameters}, new, self.memory)
        if statistics:
            new |= here.strategy.pool(updates, weights, statistics)
        self.state = {k: new[k] for k in travels}
        self.serving = self.state


@dataclass(frozen=True)
class Point:
    """One round on the curve: training loss, and mean accuracies as aggregated where the round was evaluated."""

    round: int
    train_loss: float
    own: float | None = None
    unseen: float | None = None


@dataclass
class Outcome:
    """A finished run.

    Attributes:
        server: final server state.
        kept: what each user that trained keeps, by index.
        curve: one point a round.
        scores: the evaluation matrix's cells by user index.
        seconds: time spent in this process, training and evaluation.
    """

    server: Server
    kept: dict[int, State] = field(default_factory=dict)
    curve: list[Point] = field(default_factory=list)
    scores: dict[int, list[Score]] = field(default_factory=dict)
    seconds: float = 0.0


def client_round(
    here: Setting, user: int, received: State, kept: State | None, progress: Progress
) -> tuple[Update, State]:
    """One client's round: assemble its model, train it, part what travels from what stays.

    Returns:
        The update for the server, and all entries the client keeps for itself.
    """
    kept = kept or {}
    momentum = {k.removeprefix(OPTIMIZER): v for k, v in kept.items() if k.startswith(OPTIMIZER)}
    own = {k: v for k, v in kept.items() if not k.startswith(OPTIMIZER)}
    model = here.load(here.assemble(received, own))
    here.strategy.begin(model, progress)
    data = here.training_data(user)
    loss, momentum = fit(
        model,
        data,
        here.run.plan,
        seed=here.run.seed,
        round=progress.round,
        # One place that holds one user's data draws as that user would: then it is the same training.
        user=here.population.seen[0] if user == EVERYONE else user,
        shared=set(here.ownership.travels),
        optimizer_state=momentum,
    )
    state = clone(model.state_dict())
    travels = {k: state[k] for k in here.ownership.travels}
    stays = {k: state[k] for k in here.ownership.kept}
    stays |= {OPTIMIZER + k: v for k, v in momentum.items()}
    return Update(user, travels, len(data), loss), stays


def client_evaluation(
    here: Setting,
    user: int,
    received: State,
    kept: State | None,
    *,
    columns: tuple[Column, ...],
    globally: bool,
) -> list[Score]:
    """One user's cells of the evaluation matrix, with its model as assembled after aggregation."""
    own = {k: v for k, v in (kept or {}).items() if not k.startswith(OPTIMIZER)}
    person = here.population.users[user]
    return evaluate_user(
        here.scratch,
        here.assemble(received, own),
        calibration=person.train.x,
        test=person.test,
        unseen=user in here.population.unseen,
        everyone=here.everyone if globally else None,
        columns=columns,
        online_prior=here.run.plan.online_prior,
    )


def client_talk(
    here: Setting, user: int, received: State, kept: State | None, answers: Sequence[dict[str, Moments]]
) -> dict[str, Moments] | None:
    """What one client says next in settling statistics, after the answers heard so far; None at the end."""
    own = {k: v for k, v in (kept or {}).items() if not k.startswith(OPTIMIZER)}
    state = here.assemble(received, own)
    x = here.training_data(user).x
    return replay(lambda: here.strategy.settle(here.load(state), x), answers)


def settled(here: Setting, state: State, answers: Sequence[dict[str, Moments]]) -> State:
    """``state`` with its statistics replaced by those that the clients agreed on."""
    model: nn.Module = here.load(here.assemble(state, None))
    layers = statistics_layers(model)
    for answer in answers:
        for path, moments in answer.items():
            set_statistics(layers[path], moments)
    agreed = clone(statistics_of(model))
    return {k: agreed.get(k, v) for k, v in state.items()}


def evaluated(here: Setting, round: int) -> bool:
    """Whether a round gets a point with accuracies on the curve."""
    return round % here.run.plan.eval_every == 0 or round == here.run.plan.rounds


def global_testers(here: Setting) -> set[int]:
    """Seen users whose model meets the pooled test set as aggregated: all, or one where all models are the same."""
    return set(here.population.seen if here.ownership.personal else here.population.seen[:1])


def served(here: Setting) -> list[int]:
    """Users with a model: everybody, except unseen users where no model is shared."""
    lonely = here.ownership.owners[Role.BODY] is LOCAL
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
    step: ServerStep | None = None,
    resume: Outcome | None = None,
    on_round: Callable[[int, Outcome], None] | None = None,
) -> Outcome:
    """Run a whole federation in one process: the readable version, and the oracle of every engine.

    Args:
        run: what to do.
        step: the server's step on parameters (None: take the mean).
        resume: an unfinished outcome to go on from.
        on_round: told after each round.

    >>> from fedbn.run import Plan
    >>> run = Run("digits8", "fedbn", plan=Plan(rounds=1, eval_every=1))
    >>> len(federate(run).curve)
    1
    """
    here = setting(run)
    began = time.perf_counter()
    out = resume or Outcome(Server(here.start(), here.start()))
    spent = out.seconds
    for number in range(len(out.curve) + 1, run.plan.rounds + 1):
        progress = Progress(number, run.plan.rounds)
        updates = []
        for user in here.sampled(number):
            update, out.kept[user] = client_round(here, user, out.server.state, out.kept.get(user), progress)
            updates.append(update)
        out.server.advance(here, updates, number, step)
        if evaluated(here, number) and here.strategy.settles:
            out.server.serving = settled(here, out.server.state, list(_talk(here, out)))
        scores = _evaluate(here, out, ("aggregated",), ()) if evaluated(here, number) else {}
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
    out.scores = final_scores(
        _evaluate(here, out, ("aggregated",), global_testers(here)),
        _evaluate(here, out, COLUMNS[1:], here.population.seen),
    )
    out.seconds = spent + time.perf_counter() - began
    return out


def final_scores(*parts: dict[int, list[Score]]) -> dict[int, list[Score]]:
    """Cells of several evaluations together, by user."""
    users = sorted({u for part in parts for u in part})
    return {u: [s for part in parts for s in part.get(u, [])] for u in users}


def mean_loss(updates: Sequence[Update]) -> float:
    """Training loss over all examples of a round."""
    total = sum(u.examples for u in updates)
    return sum(u.loss * u.examples for u in updates) / total


def _talk(here: Setting, out: Outcome) -> Iterator[dict[str, Moments]]:
    answers: list[dict[str, Moments]] = []
    while True:
        said = [client_talk(here, u, out.server.state, out.kept.get(u), answers) for u in here.trainers]
        heard = [s for s in said if s is not None]
        if len(heard) < len(said):
            return
        answers.append(union(heard))
        yield answers[-1]


def _evaluate(
    here: Setting, out: Outcome, columns: tuple[Column, ...], globally: Sequence[int] | set[int]
) -> dict[int, list[Score]]:
    return {
        user: client_evaluation(
            here,
            user,
            out.server.serving,
            out.kept.get(user),
            columns=columns,
            globally=user in globally,
        )
        for user in served(here)
    }
