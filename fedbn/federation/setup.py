"""Build the context of a run from its scenario, partition, shift and model."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from fedbn.config import parts
from fedbn.data.partition import repartition
from fedbn.data.population import Population, User
from fedbn.data.sensors import sensor_notices
from fedbn.data.shift import shift
from fedbn.data.splits import carve_validation
from fedbn.errors import UserError
from fedbn.federation.checks import check_context, check_population
from fedbn.federation.context import RunContext
from fedbn.federation.run import Run, task_of
from fedbn.models import build
from fedbn.nn.roles import CLASSES, clone
from fedbn.personalization.treatment import treatment
from fedbn.scenarios.base import scenario
from fedbn.strategies.ownership import Ownership
from fedbn.tasks import Task

MAX_CONTEXTS = 4
"""Size of the cache of contexts: this many runs can train in turns in one process."""


def check_device(text: str) -> None:
    """Check that tensors can be created on a device.

    Raises:
        UserError: an unknown device, or one that this machine does not have; the message lists those that it has.

    >>> check_device("cpu")
    """
    try:
        torch.empty(1, device=text).add(1).cpu()
    except Exception as error:  # backends raise different errors
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        found += ["mps"] if torch.backends.mps.is_available() else []
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"device {text!r} cannot be used here ({reason}): choose one of {', '.join(found)}") from None


@lru_cache(maxsize=4)
def load_population(
    scenario_text: str, partition: str, shift_text: str, seed: int, validation: bool, device: str, task: Task
) -> Population:
    """Load, partition and shift the users of a run; cached for all strategies that share them."""
    check_device(device)
    loaded = scenario(scenario_text).load_for(task, seed)
    if loaded.remote and (partition != "natural" or shift_text or validation):
        raise UserError(f"{scenario_text}: the data stay on the nodes and cannot be partitioned, shifted or split here")
    population = shift(repartition(loaded, partition, seed), shift_text, seed)
    if validation:
        seen = tuple(carve_validation(population.users[i]) for i in population.seen)
        population = replace(population, users=seen, unseen=())
    return replace(population, users=tuple(_on_device(user, device) for user in population.users))


def _on_device(user: User, device: str) -> User:
    """The user's data on a device, without examples for validation, which are no longer needed."""
    stream = None if user.stream is None else user.stream.to(device)
    return User(user.name, user.domain, user.train.to(device), user.test.to(device), stream=stream)


@lru_cache(maxsize=MAX_CONTEXTS)
def build_context(run: Run) -> RunContext:
    """Load, build and check everything a run needs.

    Raises:
        UserError: settings or data that would fail or mislead later; raised before any training.
    """
    return build_context_for(run, population_of(run))


def population_of(run: Run) -> Population:
    """The users of a run, partitioned and shifted."""
    task = task_of(run)
    return load_population(run.scenario, run.partition, run.shift, run.seed, run.validation, run.device, task)


def build_context_for(run: Run, population: Population) -> RunContext:
    """Like `build_context`, for an existing population.

    Settings of the run that describe the origin of the data are ignored.

    Raises:
        UserError: as `build_context`.
    """
    task = task_of(run)
    notices = check_population(population, task)
    y = torch.cat([population.users[i].train.y for i in population.seen])
    fitted = task.fit(y, population.classes)
    if population.remote and fitted != task:
        raise UserError(
            f"task {task.name!r} needs values of all users' training targets, but here the data stay on the nodes: set "
            "them as options, such as weights= or center= and scale="
        )
    task = fitted
    chosen = treatment(run.strategy)
    chosen.norm.validate_population(population)
    if population.remote and chosen.norm.is_centralized:
        raise UserError(
            f"{run.strategy} pools all data in one place, but here the data stay on the nodes: choose another strategy"
        )
    text = run.model or scenario(run.scenario).model
    model = build(text, population.shape, task.output_shape(y, population.classes)[0], run.seed, run.head)
    if not task.has_posterior:
        setattr(model, CLASSES, 0)
    model = chosen.norm.prepare_model(model).to(run.device)
    ownership = Ownership.of(model, chosen, parts(run.private))
    ctx = RunContext(run, population, task, chosen, ownership, clone(model.state_dict()), model, ())
    return replace(ctx, notices=(*population.notices, *sensor_notices(population), *notices, *check_context(ctx)))
