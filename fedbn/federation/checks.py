"""Checks of a run's data and model before training starts."""

from __future__ import annotations

import torch

from fedbn.data.population import Population
from fedbn.errors import UserError
from fedbn.federation.context import CENTRAL_TRAINER, RunContext
from fedbn.federation.protection import privacy_notices


def check_population(population: Population) -> list[str]:
    """Check that every user has valid training and test data.

    Returns:
        Notices about data that work but may surprise.

    Raises:
        UserError: data that cannot be trained or tested on.
    """
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
            low, high = int(data.y.min()), int(data.y.max())
            if low < 0 or high >= classes:
                raise UserError(
                    f"user {user.name}: labels run from {low} to {high}, but there are {classes} classes, 0 to "
                    f"{classes - 1}"
                )
            own, others = list(data.x.shape[1:]), list(population.shape)
            if own != others:
                raise UserError(f"user {user.name}: {part} examples have shape {own}, others {others}")
        if i not in population.unseen:
            trained[user.train.y.cpu()] = True
    if trained.all():
        return []
    missing = ", ".join(population.classes[i] for i in (~trained).nonzero().flatten().tolist())
    message = (
        f"no seen user has training data of class {missing}, so it is never predicted: hold out fewer users, use "
        "another seed or partition, bring more rows of the class (shorter windows), or drop it"
    )
    if int(trained.sum()) < 2:
        raise UserError(message)
    return [message]


def check_context(ctx: RunContext) -> list[str]:
    """Check a run's settings against its data and model.

    Returns:
        Notices about settings that work but may surprise.

    Raises:
        UserError: settings that cannot work.
    """
    plan, population = ctx.run.plan, ctx.population
    notices: list[str] = []
    if ctx.uses_population_prior and (ctx.strategy.is_centralized or not ctx.ownership.shared_statistics):
        raise UserError(
            f"rule {ctx.run.rule!r} needs a prior over the clients' statistics, but with strategy "
            f"{ctx.run.strategy!r} no client sends any: choose a rule that starts from the model's statistics "
            "(pseudo, ema, ...)"
        )
    trainers = ctx.trainers
    requested = plan.clients_per_round
    if requested is not None and not ctx.strategy.is_centralized and requested > len(trainers):
        raise UserError(
            f"--clients-per-round {requested} exceeds the {len(trainers)} seen users; choose at most {len(trainers)}"
        )
    mixed_batches = ctx.row_users(trainers[0]) is None
    sizes = {i: len(ctx.training_data(i)) for i in (trainers if mixed_batches else population.seen)}
    batch_size = min(plan.batch_size, min(sizes.values()))
    ctx.load(ctx.initial).train()
    rows = ctx.training_data(trainers[0]).x[: max(2, min(batch_size, 4))]
    try:
        outputs = ctx.scratch(rows[:batch_size] if batch_size < 2 else rows)
    except UserError:
        raise
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        smallest = min(sizes, key=sizes.__getitem__)
        cause = f"user {population.users[smallest].name}, who has a single training example"
        if plan.batch_size == 1:
            cause = f"batches of one (--batch-size {plan.batch_size})"
        raise UserError(
            f"batch normalization cannot train on {cause}: use a batch size of 2 or more and users with at least 2 "
            "examples, or groupnorm, layernorm or nonorm"
        ) from None
    except RuntimeError as error:
        raise UserError(
            f"model {ctx.run.model or 'of the scenario'} does not take examples of shape "
            f"{list(population.shape)}: {error}"
        ) from None
    finally:
        ctx.load(ctx.initial)
    if outputs.dim() != 2 or outputs.shape[1] != len(population.classes):
        raise UserError(
            f"the model returns outputs of shape {list(outputs.shape[1:])} for {len(population.classes)} classes: it "
            "must return logits [N, classes]"
        )
    small = [population.users[i].name for i in trainers if i != CENTRAL_TRAINER and sizes[i] < plan.batch_size]
    if small:
        notices.append(
            f"{len(small)} of {len(trainers)} users have fewer training examples than a batch of {plan.batch_size} "
            f"({', '.join(small[:5])}{', ...' if len(small) > 5 else ''}): they train on one smaller batch per epoch; "
            f"--batch-size {min(sizes.values())} would fit all"
        )
    if plan.batch_size == 1 and any(role == "statistics" for role in ctx.ownership.roles.values()):
        notices.append("batches of one: each window is normalized on its own (instance statistics)")
    return notices + privacy_notices(ctx)
