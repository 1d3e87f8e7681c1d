"""Checks of a run's data and model before training starts."""

from __future__ import annotations

import torch

from fedbn.data.population import Population
from fedbn.errors import UserError
from fedbn.federation.context import EVERYONE, RunContext
from fedbn.federation.protection import statement
from fedbn.nn.roles import Role


def check_data(population: Population) -> None:
    """Raise for data that cannot be trained or tested on."""
    classes = len(population.classes)
    trained = torch.zeros(classes, dtype=torch.bool)
    for i, user in enumerate(population.users):
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
            if tuple(data.x.shape[1:]) != population.shape:
                raise UserError(
                    f"user {user.name}: {part} examples have shape {list(data.x.shape[1:])}, "
                    f"others {list(population.shape)}"
                )
        if i not in population.unseen:
            trained[user.train.y.cpu()] = True
    if not trained.all():
        missing = [population.classes[i] for i in (~trained).nonzero().flatten().tolist()]
        raise UserError(
            f"no seen user has training data of class {', '.join(missing)}: drop the class or see other users"
        )


def check(made: RunContext) -> list[str]:
    """Raise for settings that cannot work on these data; return notices for those that can but surprise."""
    plan, population = made.run.plan, made.population
    notices: list[str] = []
    if made.asks_population and (
        made.strategy.is_centralized
        or not any(made.ownership.roles[k] is Role.STATISTICS for k in made.ownership.travels)
    ):
        raise UserError(
            f"rule {made.run.rule!r} starts users from what clients' statistics are, and with strategy "
            f"{made.run.strategy!r} no client sends any: choose a rule that starts from the model's (pseudo, ema, ...)"
        )
    trainers = made.trainers
    wanted = plan.clients_per_round
    if wanted is not None and not made.strategy.is_centralized and wanted > len(trainers):
        raise UserError(
            f"--clients-per-round {wanted} asks for more than the {len(trainers)} seen users; "
            f"choose at most {len(trainers)}"
        )
    together = made.owners_of_rows(trainers[0]) is None
    sizes = {i: len(made.training_data(i)) for i in (trainers if together else population.seen)}
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
            else f"user {population.users[small].name}, who has a single training example"
        )
        raise UserError(
            f"batch normalization cannot train on {cause}: use a batch size of 2 or more and users with at least 2 "
            "examples, or groupnorm, layernorm or nonorm"
        ) from None
    except RuntimeError as error:
        raise UserError(
            f"model {made.run.model or 'of the scenario'} does not take examples of shape "
            f"{list(population.shape)}: {error}"
        ) from None
    finally:
        made.load(made.initial)
    if outputs.dim() != 2 or outputs.shape[1] != len(population.classes):
        raise UserError(
            f"the model gives outputs of shape {list(outputs.shape[1:])} for {len(population.classes)} classes: it "
            "must return logits [N, classes]"
        )
    few = [population.users[i].name for i in trainers if i != EVERYONE and sizes[i] < plan.batch_size]
    if few:
        notices.append(
            f"{len(few)} of {len(trainers)} users have fewer training examples than a batch of {plan.batch_size} "
            f"({', '.join(few[:5])}{', ...' if len(few) > 5 else ''}): they train on one smaller batch an epoch; "
            f"--batch-size {min(sizes.values())} would fit all"
        )
    if plan.batch_size == 1 and any(role == "statistics" for role in made.ownership.roles.values()):
        notices.append("batches of one: each window is normalized by itself (instance statistics)")
    return notices + statement(made)
