"""Privacy applied to the messages of a round: clipping, noise and secure aggregation."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.federation.context import RunContext
from fedbn.nn.roles import State
from fedbn.personalization.base import Personalization
from fedbn.privacy.accounting import epsilon
from fedbn.privacy.mechanism import (
    Privacy,
    flat,
    from_sums,
    parameter_keys,
    released,
    statistics_pairs,
    to_sums,
    unflat,
)
from fedbn.privacy.secure_aggregation import decode, encode, mask, total
from fedbn.seeds import generator
from fedbn.strategies.base import NormStrategy, Progress, Update
from fedbn.strategies.global_pooled import GlobalPooled


def protected(ctx: RunContext, update: Update, received: State, progress: Progress) -> Update:
    """What a client really sends in place of ``update``, under the run's protection.

    Raises:
        UserError: as `released`; or a value does not fit a secure sum.
    """
    rule = ctx.privacy
    if rule is None:
        return update
    if rule.changes:
        draw = generator(ctx.run.seed, "privacy", progress.round, update.user)
        if rule.entropy == "system":
            draw.manual_seed(secrets.randbits(63))
        update = released(rule, update, received, ctx.ownership, draw)
    return masked(ctx, update, received, progress) if rule.secure else update


def statement(ctx: RunContext) -> list[str]:
    """In words, what the run's protection guarantees and what it does not.

    Raises:
        UserError: the treatment tells what the protection does not cover; the accountant is missing.
    """
    rule = ctx.privacy
    if rule is None:
        return []
    _require_covered(ctx, rule)
    plan = ctx.run.plan
    rounds = [ctx.sampled(r) for r in range(1, plan.rounds + 1)]
    often = max(sum(u in sampled for sampled in rounds) for u in ctx.trainers)
    parts = bool(parameter_keys(ctx.ownership)) + bool(statistics_pairs(ctx.ownership))
    said = []
    if rule.changes and plan.weighting == "samples":
        said.append("privacy: numbers of examples are not sent, so every client counts the same")
    if not parts:
        said.append("privacy: nothing but losses and scores leaves a client here")
    elif rule.noise:
        # Replacing a user moves a bounded vector by up to twice its bound.
        spent = epsilon(rule.noise / 2, often * parts, rule.delta)
        said.append(
            f"privacy: user-level (all of one user's data replaced), against the server and everybody else: epsilon = "
            f"{spent:.3g} at delta = {rule.delta:g}, for a user drawn in {often} rounds with {parts} noised parts each"
        )
        if rule.secure:
            drawn = len(rounds[0])
            joint = epsilon(rule.noise * math.sqrt(drawn) / 2, often * parts, rule.delta)
            said.append(
                f"privacy: against who sees only the sums, if all {drawn} clients of a round add their noise: "
                f"epsilon = {joint:.3g} at the same delta"
            )
        if rule.entropy == "run":
            said.append(
                "privacy: the noise comes from the run's seed, so that the run repeats; where it has to protect, "
                "entropy=system draws it afresh"
            )
    elif rule.changes:
        said.append("privacy: messages are bounded but not noised: no differential privacy")
    if rule.secure:
        said.append("privacy: masks are drawn from the run's seed in place of agreed keys: a simulation of secure sums")
    return [*said, "privacy: losses and scores, with which the study measures, are outside the protection"]


def _require_covered(ctx: RunContext, rule: Privacy) -> None:
    norm, personal = type(ctx.strategy), type(ctx.personal)
    name = ctx.run.strategy
    if norm.is_centralized:
        raise UserError(f"privacy: {name} brings all data to one place, so there are no messages to protect")
    tells = [
        m for m in ("before_local_training", "after_local_training") if getattr(norm, m) is not getattr(NormStrategy, m)
    ]
    tells += [m for m in ("syncs_statistics", "syncs_first_batch") if getattr(norm, m)]
    if personal.server_broadcast is not _default_broadcast():
        tells.append("server_broadcast")
    if tells:
        raise UserError(
            f"privacy: {name} sends more than the model's entries ({', '.join(tells)}), which is not protected: "
            "choose another treatment, or no --privacy"
        )
    if rule.changes or rule.secure:
        statistics_pairs(ctx.ownership)
    if rule.secure:
        require_summable(ctx)


def _default_broadcast() -> object:

    return Personalization.server_broadcast


MASKED = "masked"
"""Name of the one entry of a masked message."""


EVERYBODY = -2
"""Who a sum is from."""


def message_size(ctx: RunContext) -> int:
    """Numbers in a client's message: its weight, parameters, and two a channel with statistics."""
    return 1 + sum(ctx.initial[k].numel() for k in ctx.ownership.travels)


def masked(ctx: RunContext, update: Update, received: State, progress: Progress) -> Update:
    """A client's message: weight, parameters and statistics in one masked vector.

    Raises:
        UserError: a number that does not fit.
    """
    rule = ctx.privacy
    assert rule is not None
    table, peers = ctx.ownership, ctx.sampled(progress.round)
    weight = ctx.weight(update.examples)
    keys, pairs = parameter_keys(table), statistics_pairs(table)
    moved = flat(update.state, keys) - flat(received, keys)
    cpu = {k: v.cpu() for k, v in received.items()}
    mine = {k: v.cpu() for k, v in update.state.items()}
    vector = torch.cat([torch.ones(1).double(), moved, _statistics(ctx, mine, cpu, pairs)]) * weight
    words = encode(vector, rule.bits, len(peers))
    words = words + mask(update.user, peers, len(words), ctx.run.seed, progress.round)
    return Update(update.user, {MASKED: torch.from_numpy(words.view(np.int64))}, 1, update.loss)


def opened(ctx: RunContext, updates: Sequence[Update], sent: State, round: int) -> Update:
    """The clients' mean as one update, from the sum of their messages.

    Args:
        ctx: the run's context.
        updates: what all clients of the round sent.
        sent: what they were sent.
        round: counted from 1.

    Raises:
        UserError: a client's message is missing, so that masks do not cancel.
    """
    rule = ctx.privacy
    assert rule is not None
    if missing := set(ctx.sampled(round)) - {u.user for u in updates}:
        raise UserError(
            f"secure sums need every client of a round, and {sorted(missing)} did not reply in round {round}: run it "
            "again, or without secure=true"
        )
    vector = decode(total([u.state[MASKED].numpy().view(np.uint64) for u in updates]), rule.bits)
    table = ctx.ownership
    keys, pairs = parameter_keys(table), statistics_pairs(table)
    size = sum(sent[k].numel() for k in keys)
    mean = vector[1:] / vector[0]
    cpu = {k: v.cpu() for k, v in sent.items()}
    state = unflat(flat(sent, keys) + mean[:size], sent, keys)
    if pools_moments(ctx.strategy):
        state |= from_sums(mean[size:], cpu, pairs, 0.0)
    else:
        names = [k for pair in pairs for k in pair]
        state |= unflat(flat(cpu, names) + mean[size:], sent, names)
    state = {k: state[k].to(sent[k].device) for k in table.travels}
    return Update(EVERYBODY, state, 1, 0.0)


def _statistics(ctx: RunContext, state: State, center: State, pairs: Sequence[tuple[str, str]]) -> Tensor:
    if pools_moments(ctx.strategy):
        return to_sums(state, center, pairs)
    names = [k for pair in pairs for k in pair]
    return flat(state, names) - flat(center, names)


def pools_moments(strategy: NormStrategy) -> bool:
    """Whether a strategy pools clients' moments, rather than averaging means and variances."""
    return type(strategy).aggregate_statistics is GlobalPooled.aggregate_statistics


def require_summable(ctx: RunContext) -> None:
    """Raise `UserError` unless sums over the clients are all that the strategy's server needs."""
    kind = type(ctx.strategy)
    if (
        kind.aggregate_statistics not in (NormStrategy.aggregate_statistics, GlobalPooled.aggregate_statistics)
        or kind.group_states is not NormStrategy.group_states
    ):
        raise UserError(
            f"privacy: secure sums show the server no single client, but {ctx.run.strategy} looks at each: choose a "
            "strategy that averages or pools, such as global-pooled, fedbn or silobn"
        )
    few = min(len(ctx.sampled(r)) for r in range(1, ctx.run.plan.rounds + 1))
    if few < 2:
        raise UserError("privacy: a secure sum of one client is that client's message: let at least 2 take part")
