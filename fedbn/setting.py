"""Everything of a run that is fixed before its first round: data, model, who owns what. Checked here, once.

A setting is made once a process and run (`setting`) and handed to the functions of a round; simulated
clients share its scratch model, whose whole state is loaded before each use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from fedbn.data.partition import repartition
from fedbn.data.shift import shift
from fedbn.errors import UserError
from fedbn.evaluation import pooled_test
from fedbn.models import build
from fedbn.online.rule import client_rule
from fedbn.personal import Personalisation, Treatment, treatment
from fedbn.privacy import Privacy, parse_privacy, statement
from fedbn.roles import Role, State, clone, split
from fedbn.run import Run
from fedbn.scenario import Examples, Population, User, scenario
from fedbn.seeds import generator, numpy_generator
from fedbn.strategy import NormStrategy, Ownership

EVERYONE = -1
"""Index of the one client that holds all seen users' data when a strategy gathers them."""


@dataclass(frozen=True)
class Setting:
    """A run made concrete.

    Attributes:
        run: the value it was made from.
        population: users with their data, partitioned and shifted.
        treatment: strategy and personalisation.
        ownership: who owns each entry of the model.
        initial: the model's state before training, the same for every client.
        scratch: one model for all to compute with.
        notices: what the user should know and did not ask for.
    """

    run: Run
    population: Population
    treatment: Treatment
    ownership: Ownership
    initial: State
    scratch: nn.Module
    notices: tuple[str, ...]

    @property
    def strategy(self) -> NormStrategy:
        """How normalisation is treated."""
        return self.treatment.norm

    @property
    def personal(self) -> Personalisation:
        """How clients personalise."""
        return self.treatment.personal

    @cached_property
    def privacy(self) -> Privacy | None:
        """How clients' messages are protected; None: not at all."""
        return parse_privacy(self.run.privacy)

    @property
    def asks_population(self) -> bool:
        """Whether the rule of the online column starts users from what clients' statistics are."""
        return bool(self.run.rule) and client_rule(self.run.rule).wants == "n0"

    def hears_registry(self, user: int) -> bool:
        """Whether a user is told every client's statistics for the last evaluation."""
        return user in self.population.unseen or self.asks_population

    def view(self, user: int) -> str:
        """Name of the view of the server's state that a user gets."""
        return "" if user == EVERYONE else self.strategy.view(user, self.population.users[user])

    @cached_property
    def everyone(self) -> Examples:
        """The pooled test rows of the matrix's global row."""
        return pooled_test(
            [self.population.users[i].test for i in self.population.seen],
            self.run.plan.global_test,
            generator(self.run.seed, "pooled test"),
        ).to(self.run.device)

    @cached_property
    def gathered(self) -> Examples:
        """All seen users' training examples."""
        return Examples.concat([self.population.users[i].train for i in self.population.seen])

    @property
    def trainers(self) -> tuple[int, ...]:
        """Who trains: the seen users, or the one place where their data are."""
        return (EVERYONE,) if self.strategy.gathers else self.population.seen

    def training_data(self, user: int) -> Examples:
        """Training examples of one trainer."""
        return self.gathered if user == EVERYONE else self.population.users[user].train

    def owners_of_rows(self, user: int) -> Tensor | None:
        """``[n]`` whose each row of a trainer's data is, where batches are to be of one user; else None."""
        if user != EVERYONE or not self.run.plan.user_batches:
            return None
        lengths = torch.tensor([len(self.population.users[i].train) for i in self.population.seen])
        return torch.arange(len(lengths)).repeat_interleave(lengths)

    def sampled(self, round: int) -> list[int]:
        """Who trains in a round, in order; drawn by (seed, round) alone."""
        trainers = self.trainers
        count = self.run.plan.clients_per_round
        if count is None or count >= len(trainers):
            return list(trainers)
        draw = numpy_generator(self.run.seed, "clients", round)
        return sorted(trainers[i] for i in draw.choice(len(trainers), count, replace=False).tolist())

    def weight(self, examples: int) -> float:
        """A client's weight in the mean."""
        return float(examples) if self.run.plan.weighting == "samples" else 1.0

    def start(self) -> State:
        """The server's state before the first round: the travelling entries."""
        return clone(split(self.initial, set(self.ownership.travels))[0])

    def assemble(self, received: State, kept: State | None) -> State:
        """A user's whole model: the server's entries, its own where it has them, initial ones otherwise."""
        if missing := [k for k in self.ownership.travels if k not in received]:
            raise KeyError(f"missing {missing}")
        own = kept or {}
        mine = {k: own[k] for k in self.ownership.kept if k in own}
        server = {k: received[k] for k in self.ownership.travels}
        return self.initial | server | mine

    def load(self, state: State) -> nn.Module:
        """The scratch model with exactly ``state``."""
        self.scratch.load_state_dict(state, strict=True)
        return self.scratch


def carve_validation(user: User, share: float = 0.2) -> User:
    """Split a user's training recordings in time: of each (recording, class) the last ``share`` tests.

    Neighbouring windows overlap, so the row at the boundary is dropped: it belongs to neither side.
    """
    data = user.train
    train_rows, test_rows = [], []
    for recording in data.recording.unique().tolist():
        for label in data.y.unique().tolist():
            rows = ((data.recording == recording) & (data.y == label)).nonzero().flatten()
            n = int(len(rows) * share)
            if n < 1 or len(rows) - n - 1 < 1:
                train_rows.append(rows)
                continue
            train_rows.append(rows[: len(rows) - n - 1])
            test_rows.append(rows[len(rows) - n :])
    if not test_rows:
        raise UserError(
            f"user {user.name} has too few examples ({len(data)}) to hold any out for validation: tune with fewer "
            "clients in --partition, or set --lr yourself"
        )
    return User(
        user.name,
        user.domain,
        data.take(torch.cat(train_rows).sort().values),
        data.take(torch.cat(test_rows).sort().values),
    )


@lru_cache(maxsize=4)
def population(
    scenario_text: str, partition: str, shift_text: str, seed: int, validation: bool, device: str
) -> Population:
    """The users of a run, computed once a process for all strategies that share them."""
    loaded = scenario(scenario_text).load(seed)
    if loaded.remote and (partition != "natural" or shift_text or validation):
        raise UserError(f"{scenario_text}: data that lie with the nodes cannot be partitioned, shifted or split here")
    people = shift(repartition(loaded, partition, seed), shift_text, seed)
    users = people.users
    unseen = people.unseen
    if validation:
        users = tuple(carve_validation(users[i]) for i in people.seen)
        unseen = ()
    users = tuple(User(u.name, u.domain, u.train.to(device), u.test.to(device)) for u in users)
    return replace(people, users=users, unseen=unseen)


@lru_cache(maxsize=2)
def setting(run: Run) -> Setting:
    """Load, build and check everything a run needs.

    Raises:
        UserError: whatever would fail or mislead later; nothing has been trained then.
    """
    return setting_for(run, population(run.scenario, run.partition, run.shift, run.seed, run.validation, run.device))


def setting_for(run: Run, people: Population) -> Setting:
    """As `setting`, with users that are at hand already; of the run, what says where they are from is not read.

    Raises:
        UserError: as `setting`.
    """
    check_data(people)
    chosen = treatment(run.strategy)
    chosen.norm.suit(people)
    if people.remote and chosen.norm.gathers:
        raise UserError(
            f"{run.strategy} brings all data to one place, but here they stay with the nodes: choose another"
        )
    model = build(run.model or scenario(run.scenario).model, people.shape, len(people.classes), run.seed)
    model = chosen.norm.prepare(model).to(run.device)
    ownership = Ownership.of(model, chosen)
    made = Setting(run, people, chosen, ownership, clone(model.state_dict()), model, ())
    return replace(made, notices=tuple(check(made)))


def check_data(people: Population) -> None:
    """Raise for data that cannot be trained or tested on."""
    classes = len(people.classes)
    trained = torch.zeros(classes, dtype=torch.bool)
    for i, user in enumerate(people.users):
        for part, data in (("training", user.train), ("test", user.test)):
            if len(data) == 0:
                raise UserError(f"user {user.name} has no {part} data: leave the user out, or use another partition")
            bad = ~torch.isfinite(data.x).flatten(1).all(1)
            if bad.any():
                raise UserError(
                    f"user {user.name}: {int(bad.sum())} of {len(data)} {part} examples hold NaN or Inf (first: row "
                    f"{int(bad.nonzero()[0])}); remove or impute them"
                )
            if int(data.y.min()) < 0 or int(data.y.max()) >= classes:
                raise UserError(
                    f"user {user.name}: labels run from {int(data.y.min())} to {int(data.y.max())}, but there are "
                    f"{classes} classes, 0 to {classes - 1}"
                )
            if tuple(data.x.shape[1:]) != people.shape:
                raise UserError(
                    f"user {user.name}: {part} examples have shape {list(data.x.shape[1:])}, "
                    f"others {list(people.shape)}"
                )
        if i not in people.unseen:
            trained[user.train.y.cpu()] = True
    if not trained.all():
        missing = [people.classes[i] for i in (~trained).nonzero().flatten().tolist()]
        raise UserError(
            f"no seen user has training data of class {', '.join(missing)}: drop the class or see other users"
        )


def check(made: Setting) -> list[str]:
    """Raise for settings that cannot work on these data; return notices for those that can but surprise."""
    plan, people = made.run.plan, made.population
    notices: list[str] = []
    if made.asks_population and (
        made.strategy.gathers or not any(made.ownership.roles[k] is Role.STATISTICS for k in made.ownership.travels)
    ):
        raise UserError(
            f"rule {made.run.rule!r} starts users from what clients' statistics are, and with strategy "
            f"{made.run.strategy!r} no client sends any: choose a rule that starts from the model's (pseudo, ema, ...)"
        )
    trainers = made.trainers
    wanted = plan.clients_per_round
    if wanted is not None and not made.strategy.gathers and wanted > len(trainers):
        raise UserError(
            f"--clients-per-round {wanted} asks for more than the {len(trainers)} seen users; "
            f"choose at most {len(trainers)}"
        )
    together = made.owners_of_rows(trainers[0]) is None
    sizes = {i: len(made.training_data(i)) for i in (trainers if together else people.seen)}
    stepping = min(plan.batch_size, min(sizes.values()))
    made.load(made.initial).train()
    rows = made.training_data(trainers[0]).x[: max(2, min(stepping, 4))]
    try:
        outputs = made.scratch(rows[:stepping] if stepping < 2 else rows)
    except UserError:
        raise
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        small = min(sizes, key=sizes.__getitem__)
        cause = (
            f"batches of one (--batch-size {plan.batch_size})"
            if plan.batch_size == 1
            else f"user {people.users[small].name}, who has a single training example"
        )
        raise UserError(
            f"batch normalisation cannot train on {cause}: use a batch size of 2 or more and users with at least 2 "
            "examples, or groupnorm, layernorm or nonorm"
        ) from None
    except RuntimeError as error:
        raise UserError(
            f"model {made.run.model or 'of the scenario'} does not take examples of shape {list(people.shape)}: {error}"
        ) from None
    finally:
        made.load(made.initial)
    if outputs.dim() != 2 or outputs.shape[1] != len(people.classes):
        raise UserError(
            f"the model gives outputs of shape {list(outputs.shape[1:])} for {len(people.classes)} classes: it must "
            "return logits [N, classes]"
        )
    few = [people.users[i].name for i in trainers if i != EVERYONE and sizes[i] < plan.batch_size]
    if few:
        notices.append(
            f"{len(few)} of {len(trainers)} users have fewer training examples than a batch of {plan.batch_size} "
            f"({', '.join(few[:5])}{', ...' if len(few) > 5 else ''}): they train on one smaller batch an epoch; "
            f"--batch-size {min(sizes.values())} would fit all"
        )
    if plan.batch_size == 1 and any(role == "statistics" for role in made.ownership.roles.values()):
        notices.append("batches of one: each window is normalised by itself (instance statistics)")
    return notices + statement(made)
