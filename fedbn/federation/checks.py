"""Checks of a run's data and model before training starts."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fedbn.augment.base import check_augmentation
from fedbn.data.population import Examples, Population
from fedbn.errors import UserError
from fedbn.federation.context import CENTRAL_TRAINER, RunContext
from fedbn.federation.protection import privacy_notices
from fedbn.models.inspection import head_notice
from fedbn.nn.roles import State
from fedbn.nn.rows import mixing_layer
from fedbn.online.rules.base import client_rule
from fedbn.online.validation import require_batch_norm_formula, require_independent_rows, require_no_classes
from fedbn.optim.base import check_optimizer
from fedbn.tasks.base import Task, check_targets

CHECKED_ROWS = 4096
"""Rows that are checked at once."""


def check_population(population: Population, task: Task) -> list[str]:
    """Check that every user has valid training and test data, with targets that fit the task.

    Returns:
        Notices about data that work but may surprise.

    Raises:
        UserError: data that cannot be trained or tested on.
    """
    targets = population.users[0].train.y.shape[1:]
    for user in population.users:
        parts = [("training", user.train), ("test", user.test)]
        if user.stream is not None:
            parts.append(("stream", user.stream))
        for part, data in parts:
            if len(data) == 0:
                raise UserError(f"user {user.name} has no {part} data: leave the user out, or use another partition")
            # In parts, because data that are memory-mapped may not fit in memory.
            bad = torch.cat([~torch.isfinite(rows).flatten(1).all(1) for rows in data.x.split(CHECKED_ROWS)])
            if bad.any():
                raise UserError(
                    f"user {user.name}: {int(bad.sum())} of {len(data)} {part} examples hold NaN or Inf (first: row "
                    f"{int(bad.nonzero()[0])}); remove or impute them"
                )
            if part != "stream":  # some of its windows have no target
                check_targets(task, data.y, population.classes, f"user {user.name}")
            if data.y.shape[1:] != targets:
                raise UserError(
                    f"user {user.name}: {part} targets have shape {list(data.y.shape[1:])}, others {list(targets)}"
                )
            own, others = list(data.x.shape[1:]), list(population.shape)
            if own != others:
                raise UserError(f"user {user.name}: {part} examples have shape {own}, others {others}")
    return task.notices(population)


def check_context(ctx: RunContext) -> list[str]:
    """Check a run's settings against its data and model.

    Returns:
        Notices about settings that work but may surprise.

    Raises:
        UserError: settings that cannot work.
    """
    plan, population = ctx.run.plan, ctx.population
    notices: list[str] = []
    trainable = (name for name, p in ctx.scratch.named_parameters() if p.requires_grad)
    ctx.personal.validate_model({name: ctx.ownership.roles[name] for name in trainable})
    if ctx.uses_population_prior and (ctx.strategy.is_centralized or not ctx.ownership.shared_statistics):
        raise UserError(
            f"rule {ctx.run.rule!r} needs a prior over the clients' statistics, but with strategy "
            f"{ctx.run.strategy!r} no client sends any: choose a rule that starts from the model's statistics "
            "(pseudo, ema, ...)"
        )
    _check_task(ctx)
    trainers = ctx.trainers
    requested = plan.clients_per_round
    if requested is not None and not ctx.strategy.is_centralized and requested > len(trainers):
        raise UserError(
            f"--clients-per-round {requested} exceeds the {len(trainers)} seen users; choose at most {len(trainers)}"
        )
    clients = min(requested or len(trainers), len(trainers))
    notices += ctx.strategy.notices(clients - int(plan.tolerate * clients))
    mixed_batches = ctx.row_users(trainers[0]) is None
    sizes = {i: len(ctx.training_data(i)) for i in (trainers if mixed_batches else population.seen)}
    batch_size = min(plan.batch_size, min(sizes.values()))
    ctx.load(ctx.initial).train()
    rows = ctx.training_data(trainers[0]).take(torch.arange(min(batch_size, 4)))
    check_augmentation(plan.augment, rows.x, rows.y)
    try:
        check_optimizer(plan, {n: p for n, p in ctx.scratch.named_parameters() if p.requires_grad})
        ctx.load(ctx.initial)
        _check_model(ctx, rows)
    except UserError:
        raise
    except Exception as error:  # a user's forward may raise anything
        if "more than 1 value per channel" in str(error):
            smallest = min(sizes, key=sizes.__getitem__)
            cause = f"user {population.users[smallest].name}, who has a single training example"
            if plan.batch_size == 1:
                cause = f"batches of one (--batch-size {plan.batch_size})"
            raise UserError(
                f"batch normalization cannot train on {cause}: use a batch size of 2 or more and users with at least 2 "
                "examples, or groupnorm, layernorm or nonorm"
            ) from None
        raise UserError(
            f"model {ctx.run.model or 'of the scenario'} does not take examples of shape "
            f"{list(population.shape)} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}): choose a "
            "model whose first layer fits, or give its factory the arguments shape and classes"
        ) from error
    finally:
        ctx.scratch.zero_grad()
        with suppress(RuntimeError):  # entries of another shape, which `_check_model` has reported
            ctx.load(ctx.initial)
    if notice := head_notice(ctx.scratch):
        notices.append(notice)
    small = [population.users[i].name for i in trainers if i != CENTRAL_TRAINER and sizes[i] < plan.batch_size]
    if small:
        notices.append(
            f"{len(small)} of {len(trainers)} users have fewer training examples than a batch of {plan.batch_size} "
            f"({', '.join(small[:5])}{', ...' if len(small) > 5 else ''}): they train on one smaller batch per epoch; "
            f"--batch-size {min(sizes.values())} would fit all"
        )
    if plan.batch_size == 1 and any(role == "statistics" for role in ctx.ownership.roles.values()):
        notices.append("batches of one: each window is normalized on its own (instance statistics)")
    return notices + check_rows(ctx, rows.x) + privacy_notices(ctx)


def _check_task(ctx: RunContext) -> None:
    """Raise if the strategy or the online rule does not support the task."""
    if ctx.strategy.needs_cross_entropy and not ctx.task.is_cross_entropy:
        raise UserError(
            f"strategy {ctx.run.strategy!r} computes the plain cross-entropy itself, which is not the loss of task "
            f"{ctx.task.name!r} with these options: choose another strategy, or classification without options"
        )
    if ctx.run.rule and not ctx.task.has_posterior:
        require_no_classes(client_rule(ctx.run.rule), ctx.task.name)


def _check_model(ctx: RunContext, rows: Examples) -> None:
    """Run a step's forward and backward pass and an evaluation on a few rows; the model ends in an undefined state."""
    model = ctx.scratch
    expected = ctx.task.output_shape(rows.y, ctx.population.classes)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            f"{type(model).__name__} has no trainable parameters: set requires_grad=True where it should learn"
        )
    _check_tied(ctx)
    with torch.random.fork_rng(devices=[]):
        outputs = model(rows.x)
        _check_outputs(outputs, len(rows), expected)
        loss = ctx.task.loss(outputs, rows.y)
        _check_loss(loss)
        loss.backward()
        _check_state(ctx.initial, model.state_dict())
        model.eval()
        with torch.no_grad():
            outputs = model(rows.x)
            _check_outputs(outputs, len(rows), expected)
            _check_scores(ctx.task, outputs, rows.y)
        _check_state(ctx.initial, model.state_dict())


def _check_scores(task: Task, outputs: Tensor, y: Tensor) -> None:
    try:
        found = task.evaluate(outputs, y)
    except UserError:
        raise
    except Exception as error:  # a user's task may raise anything
        raise UserError(
            f"task {task.name!r} cannot score outputs of shape {list(outputs.shape)}: {type(error).__name__}: {error}"
        ) from error
    if wrong := found.keys() - task.directions.keys():
        raise UserError(f"task {task.name!r} returns {', '.join(sorted(wrong))}, which its metrics do not list")
    for name, value in found.items():
        if type(value) is not float:
            raise UserError(
                f"task {task.name!r} returns a {type(value).__name__} as {name}: convert it with float(...)"
            )


def _check_loss(loss: Tensor) -> None:
    if loss.dim() or not loss.is_floating_point():
        raise UserError(
            f"the task's loss of a batch has shape {list(loss.shape)}: losses must return one value per row"
        )
    if not loss.isfinite():
        raise UserError(f"the loss of the first batch is {float(loss)}: check the scale of the targets and the model")


def _check_outputs(outputs: Any, rows: int, expected: tuple[int, ...]) -> None:
    if isinstance(outputs, Tensor) and outputs.shape == (rows, *expected) and outputs.is_floating_point():
        return
    what = f"a {type(outputs).__name__}"
    if isinstance(outputs, Tensor):
        of_batch = outputs.dim() == 0 or len(outputs) != rows
        what = f"outputs of shape {list(outputs.shape if of_batch else outputs.shape[1:])}"
        what += f" for a batch of {rows} and" if of_batch else " for"
    size = ", ".join(map(str, expected))
    raise UserError(f"the model returns {what} {expected[0]} classes: it must return outputs [N, {size}]")


def _check_state(before: State, after: State) -> None:
    """Raise if a forward pass has added, removed or resized entries, which cannot be averaged."""
    shapes = [{k: tuple(v.shape) for k, v in state.items()} for state in (before, after)]
    if changed := [k for k in {**shapes[0], **shapes[1]} if shapes[0].get(k) != shapes[1].get(k)]:
        old, new = (list(s[changed[0]]) if changed[0] in s else "absent" for s in shapes)
        raise UserError(
            f"entry {changed[0]!r} of the model changes in a forward pass from {old} to {new}: give it a fixed shape, "
            "or register it with persistent=False, so that clients can be averaged"
        )


def _check_tied(ctx: RunContext) -> None:
    """Raise if one tensor has names with different owners."""
    tensors: dict[int, list[str]] = {}
    for name, tensor in (*_named(ctx.scratch.named_parameters), *_named(ctx.scratch.named_buffers)):
        if name in ctx.ownership.roles:
            tensors.setdefault(id(tensor), []).append(name)
    for names in tensors.values():
        owners = {name: str(ctx.ownership.owner(name)) for name in names}
        if len(set(owners.values())) > 1:
            listed = ", ".join(f"{name} ({owner})" for name, owner in owners.items())
            raise UserError(
                f"one tensor has names with different owners under {ctx.run.strategy}: {listed}. Name all or none of "
                "them in --head and --private, or untie the layers"
            )


def _named(list_names: Any) -> list[tuple[str, Tensor]]:
    return list(list_names(remove_duplicate=False))


def check_rows(ctx: RunContext, x: Tensor) -> list[str]:
    """Check whether the model's answer for a row depends on the other rows of a batch.

    Args:
        ctx: the run's context.
        x: some rows.

    Returns:
        A notice if it does.

    Raises:
        UserError: it does, or a layer does not evaluate as BN, and the run has an online rule.
    """
    model = ctx.load(ctx.initial).eval()
    try:
        if ctx.run.rule:
            require_batch_norm_formula(model, f"rule {ctx.run.rule!r}")
            require_independent_rows(model, x, f"rule {ctx.run.rule!r}")
        where = mixing_layer(model, x)
    finally:
        ctx.load(ctx.initial)
    if where is None:
        return []
    return [
        f"{where} of the model mixes the windows of a batch in evaluation too, so a prediction depends on the other "
        "windows of the same user: set track_running_stats=True in BN layers for independent predictions"
    ]
