"""What clients' messages give away, measured: who sent these statistics, and what did the last window look like?

*Who is it?* Each round's statistics of a user, as the server receives them, are compared with those that all users
sent in the round before, both standardized over users; a user is found where the nearest is its own. Chance is one
over the users.

*What was in it?* Running statistics move by ``momentum`` times the gap to the last batch, so who sees two states in a
row solves for the batch's mean: of one window, if the step was one window. The error is that of the window's mean per
channel, in units of the channel's spread over windows; to guess the running mean is the control.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.federation.client import client_round
from fedbn.federation.context import RunContext
from fedbn.federation.protection import protected
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome, Server
from fedbn.federation.setup import build_context
from fedbn.nn.roles import State, statistics_layers
from fedbn.privacy.mechanism import statistics_pairs
from fedbn.statistics.recalibration import all_moments
from fedbn.strategies.base import Progress


@dataclass(frozen=True)
class Leak:
    """What one way of sending gives away.

    Attributes:
        privacy: the text of the protection.
        layers: which layers' statistics an onlooker sees.
        found: share of users whose statistics are nearest to their own of the round before.
        chance: the share that guessing finds.
        users: how many.
    """

    privacy: str
    layers: str
    found: float
    chance: float
    users: int


def rounds_of_statistics(run: Run) -> tuple[RunContext, list[dict[int, State]]]:
    """What each user sent in two consecutive rounds, all taking part.

    Raises:
        UserError: statistics do not travel, or only their sum does.
    """
    ctx = build_context(replace(run, plan=replace(run.plan, rounds=2, clients_per_round=None)).resolved())
    if ctx.privacy is not None and ctx.privacy.secure:
        raise UserError("leakage looks at single clients' messages, and secure=true shows none: leave it out")
    if not statistics_pairs(ctx.ownership):
        raise UserError(f"{run.strategy} sends no statistics, so none can leak: choose one such as global-pooled")
    out, rounds = Outcome(Server(ctx.start(), ctx.start())), []
    for number in (1, 2):
        progress, updates = Progress(number, 2), []
        for user in ctx.trainers:
            received = out.server.sends(ctx, user)
            update, out.client_states[user] = client_round(ctx, user, received, out.client_states.get(user), progress)
            updates.append(protected(ctx, update, received, progress))
        rounds.append({u.user: u.state for u in updates})
        out.server.advance(ctx, updates, number)
    return ctx, rounds


def found_again(before: dict[int, State], after: dict[int, State], pairs: list[tuple[str, str]]) -> float:
    """Share of users whose statistics are nearest to their own of the round before.

    Both rounds are standardized over users, channel by channel: what training did to everybody is no disguise.
    """
    old, new = _standardized(before, pairs), _standardized(after, pairs)
    nearest = torch.cdist(new, old).argmin(1)
    return float((nearest == torch.arange(len(new))).double().mean())


def _standardized(states: dict[int, State], pairs: list[tuple[str, str]]) -> Tensor:
    rows = [torch.cat([torch.cat([s[m], s[v].log()]).double().cpu() for m, v in pairs]) for s in states.values()]
    values = torch.stack(rows)
    return (values - values.mean(0)) / values.std(0).clamp_min(1e-12)


def measure(run: Run, controls: tuple[str, ...]) -> list[Leak]:
    """Re-identification under each protection, and where an onlooker sees the last layer alone.

    Args:
        run: what to train; two rounds of it are.
        controls: texts of protections; the empty one is none.

    Raises:
        UserError: as `rounds_of_statistics`.
    """
    out = []
    for text in controls:
        ctx, (before, after) = rounds_of_statistics(replace(run, privacy=text))
        pairs = statistics_pairs(ctx.ownership)
        for name, seen in (("all", pairs), ("last", pairs[-1:])):
            found = found_again(before, after, seen)
            out.append(Leak(ctx.run.privacy, name, found, 1 / len(after), len(after)))
    return out


def stepped_back(before: Tensor, after: Tensor, momentum: float) -> Tensor:
    """The mean of the batch that moved a running mean from one state to the next.

    >>> stepped_back(torch.tensor([0.0]), torch.tensor([0.5]), 0.1)
    tensor([5.])
    """
    return before + (after - before) / momentum


def inversion(run: Run, windows: int = 20, momentum: float = 0.1) -> dict[str, float]:
    """Mean error of a first layer's window means as solved for from consecutive states, float32 as they are sent.

    Args:
        run: whose initial model and first seen user are taken.
        windows: how many steps are watched.
        momentum: of the running mean.

    Returns:
        Errors in units of the spread over windows, by the number of windows in a step; ``guess`` is the control.
    """
    ctx = build_context(run.resolved())
    user = ctx.population.users[ctx.population.seen[0]]
    rows = user.train.x[:windows]
    model = ctx.load(ctx.initial)
    first = next(iter(statistics_layers(model)))
    means = torch.stack([all_moments(model, x[None])[first].mean for x in rows])
    spread = means.std(0).clamp_min(1e-12)
    errors: dict[str, float] = {"guess": float(((means.mean(0) - means) / spread).abs().mean())}
    for size in (1, 2, 4, 8):
        running, found = torch.zeros(means.shape[1]), []
        for i in range(0, len(means) - size + 1, size):
            new = (running + momentum * (means[i : i + size].mean(0) - running)).float()
            back = stepped_back(running, new, momentum)
            found.append(((back - means[i : i + size]) / spread).abs().mean())
            running = new
        errors[f"{size}"] = float(torch.stack(found).mean())
    return errors
