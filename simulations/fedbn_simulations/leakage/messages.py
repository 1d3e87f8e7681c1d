"""Information leaked by clients' messages: the sender's identity and the content of the last batch.

*Re-identification.* A user's statistics, as the server receives them, are compared with those that all users sent in
the round before, both standardized over users. A user is re-identified if the nearest statistics are its own. Chance is
one over the number of users.

*Inversion.* Running statistics move by ``momentum`` times the difference to the last batch. An observer of two
consecutive states can solve for the mean of the batch, which is a single window if the batch is one. The error is that
of the window's mean per channel, in units of the channel's standard deviation over windows. The control is to guess the
overall mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.federation.client import client_round
from fedbn.federation.context import RunContext
from fedbn.federation.protection import protect_update
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome, Server
from fedbn.federation.setup import build_context
from fedbn.nn.roles import State, statistics_layers
from fedbn.privacy.mechanism import statistics_pairs
from fedbn.statistics.recalibration import all_moments
from fedbn.strategies.base import Progress


@dataclass(frozen=True)
class Leak:
    """Re-identification under one protection.

    Attributes:
        privacy: text of the protection.
        layers: layers whose statistics the observer sees.
        found: share of re-identified users.
        chance: share expected by guessing.
        users: number of users.
    """

    privacy: str
    layers: str
    found: float
    chance: float
    users: int


def collect_updates(run: Run) -> tuple[RunContext, list[dict[int, State]]]:
    """Updates of all users in each of two consecutive rounds, with full participation.

    Raises:
        UserError: clients do not send statistics, or the server sees only their sum.
    """
    ctx = build_context(replace(run, plan=replace(run.plan, rounds=2, clients_per_round=None)).resolved())
    if ctx.privacy is not None and ctx.privacy.secure:
        raise UserError("leakage needs messages of single clients, which secure=true hides: leave it out")
    if not statistics_pairs(ctx.ownership):
        raise UserError(f"{run.strategy} sends no statistics, so none can leak: choose one such as global-pooled")
    outcome, rounds = Outcome(Server(ctx.initial_server_state(), ctx.initial_server_state())), []
    for number in (1, 2):
        progress, updates = Progress(number, 2), []
        for user in ctx.trainers:
            received = outcome.server.state_for(ctx, user)
            update, outcome.client_states[user] = client_round(
                ctx, user, received, outcome.client_states.get(user), progress
            )
            updates.append(protect_update(ctx, update, received, progress))
        rounds.append({u.user: u.state for u in updates})
        outcome.server.advance(ctx, updates, number)
    return ctx, rounds


def reidentified_share(before: dict[int, State], after: dict[int, State], pairs: list[tuple[str, str]]) -> float:
    """Share of users whose statistics are nearest to their own of the round before.

    Each channel is standardized over users in both rounds, which removes changes common to all users.
    """
    old, new = _standardized(before, pairs), _standardized(after, pairs)
    nearest = torch.cdist(new, old).argmin(1)
    return float((nearest == torch.arange(len(new))).double().mean())


def _standardized(states: dict[int, State], pairs: list[tuple[str, str]]) -> Tensor:
    rows = [torch.cat([torch.cat([s[m], s[v].log()]).double().cpu() for m, v in pairs]) for s in states.values()]
    values = torch.stack(rows)
    return (values - values.mean(0)) / values.std(0).clamp_min(1e-12)


def measure(run: Run, controls: tuple[str, ...]) -> list[Leak]:
    """Re-identification under each protection, from all layers and from the last layer only.

    Args:
        run: is trained for two rounds.
        controls: texts of protections; an empty text means none.

    Raises:
        UserError: as for `collect_updates`.
    """
    out = []
    for text in controls:
        ctx, (before, after) = collect_updates(replace(run, privacy=text))
        pairs = statistics_pairs(ctx.ownership)
        for name, observed in (("all", pairs), ("last", pairs[-1:])):
            found = reidentified_share(before, after, observed)
            out.append(Leak(ctx.run.privacy, name, found, 1 / len(after), len(after)))
    return out


def batch_mean_between(before: Tensor, after: Tensor, momentum: float) -> Tensor:
    """Mean of the batch that moved a running mean from ``before`` to ``after``.

    >>> batch_mean_between(torch.tensor([0.0]), torch.tensor([0.5]), 0.1)
    tensor([5.])
    """
    return before + (after - before) / momentum


def inversion(run: Run, windows: int = 20, momentum: float = 0.1) -> dict[str, float]:
    """Mean error of the first layer's window means recovered from consecutive states, in float32 as sent.

    Args:
        run: provides the initial model and the first seen user.
        windows: number of windows observed.
        momentum: of the running mean.

    Returns:
        Errors in units of the standard deviation over windows, by the number of windows per step; ``guess`` is the
        control.
    """
    ctx = build_context(run.resolved())
    user = ctx.population.users[ctx.population.seen[0]]
    rows = user.train.x[:windows]
    model = ctx.load(ctx.initial)
    first = next(iter(statistics_layers(model)))
    means = torch.stack([all_moments(model, x[None])[first].mean for x in rows])
    std = means.std(0).clamp_min(1e-12)
    errors: dict[str, float] = {"guess": float(((means.mean(0) - means) / std).abs().mean())}
    for size in (1, 2, 4, 8):
        running, step_errors = torch.zeros(means.shape[1]), []
        for i in range(0, len(means) - size + 1, size):
            new = (running + momentum * (means[i : i + size].mean(0) - running)).float()
            recovered = batch_mean_between(running, new, momentum)
            step_errors.append(((recovered - means[i : i + size]) / std).abs().mean())
            running = new
        errors[f"{size}"] = float(torch.stack(step_errors).mean())
    return errors
