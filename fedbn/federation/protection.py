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
    clip_and_noise,
    flatten_entries,
    from_sums,
    statistics_pairs,
    to_sums,
    unflatten_entries,
)
from fedbn.privacy.secure_aggregation import decode, encode, modular_sum, pairwise_mask
from fedbn.seeds import generator
from fedbn.strategies.base import NormStrategy, Progress, Update
from fedbn.strategies.global_pooled import GlobalPooled


def protect_update(ctx: RunContext, update: Update, received: State, progress: Progress) -> Update:
    """Apply the run's privacy protection to an update.

    Raises:
        UserError: as `clip_and_noise`; or a value that does not fit a secure sum.
    """
    privacy = ctx.privacy
    if privacy is None:
        return update
    if privacy.is_bounded:
        draw = generator(ctx.run.seed, "privacy", progress.round, update.user)
        if privacy.entropy == "system":
            draw.manual_seed(secrets.randbits(63))
        update = clip_and_noise(privacy, update, received, ctx.ownership, draw)
    return mask_update(ctx, update, received, progress) if privacy.secure else update


def privacy_notices(ctx: RunContext) -> list[str]:
    """Notices on what the run's privacy protection guarantees and what it does not.

    Raises:
        UserError: the method sends data that the protection does not cover, or the accountant is missing.
    """
    privacy = ctx.privacy
    if privacy is None:
        return []
    _require_covered(ctx, privacy)
    plan = ctx.run.plan
    rounds = [ctx.sample_clients(r) for r in range(1, plan.rounds + 1)]
    participations = max(sum(u in sampled for sampled in rounds) for u in ctx.trainers)
    parts = bool(ctx.ownership.shared_parameters) + bool(statistics_pairs(ctx.ownership))
    notices = []
    if privacy.is_bounded and plan.weighting == "samples":
        notices.append("privacy: numbers of examples are not sent, so every client counts the same")
    if not parts:
        notices.append("privacy: clients send nothing but losses and scores here")
    elif privacy.noise:
        # Replacing a user moves a bounded vector by up to twice its bound.
        spent = epsilon(privacy.noise / 2, participations * parts, privacy.delta)
        notices.append(
            "privacy: user-level (all of one user's data replaced), against the server and all others: epsilon = "
            f"{spent:.3g} at delta = {privacy.delta:g}, for a user sampled in "
            f"{participations} rounds with {parts} noised parts each"
        )
        if privacy.secure:
            clients = len(rounds[0])
            joint = epsilon(privacy.noise * math.sqrt(clients) / 2, participations * parts, privacy.delta)
            notices.append(
                f"privacy: against an observer of the sums only, if all {clients} clients of a round add their noise: "
                f"epsilon = {joint:.3g} at the same delta"
            )
        if privacy.entropy == "run":
            notices.append(
                "privacy: the noise comes from the run's seed, so that the run is reproducible; for real protection "
                "use entropy=system"
            )
    elif privacy.is_bounded:
        notices.append("privacy: messages are clipped but not noised: no differential privacy")
    if privacy.secure:
        notices.append("privacy: masks are drawn from the run's seed, not from agreed keys: secure sums are simulated")
    return [*notices, "privacy: losses and scores, which the study measures, are not protected"]


def _require_covered(ctx: RunContext, privacy: Privacy) -> None:
    norm, personal = type(ctx.strategy), type(ctx.personal)
    name = ctx.run.strategy
    if norm.is_centralized:
        raise UserError(f"privacy: {name} pools all data in one place, so there are no messages to protect")
    hooks = ("before_local_training", "after_local_training")
    extra = [m for m in hooks if getattr(norm, m) is not getattr(NormStrategy, m)]
    extra += [m for m in ("syncs_statistics", "syncs_first_batch") if getattr(norm, m)]
    if personal.server_broadcast is not Personalization.server_broadcast:
        extra.append("server_broadcast")
    if extra:
        raise UserError(
            f"privacy: {name} sends more than the model's entries ({', '.join(extra)}), which is not protected: "
            "choose another method, or no --privacy"
        )
    if privacy.is_bounded or privacy.secure:
        statistics_pairs(ctx.ownership)
    if privacy.secure:
        require_summable(ctx)


MASKED = "masked"
"""Name of the only entry of a masked message."""

ALL_CLIENTS = -2
"""User index of an update that is a sum over clients."""


def message_size(ctx: RunContext) -> int:
    """Length of a client's masked message: weight, parameters, and two numbers per channel with statistics."""
    return 1 + sum(ctx.initial[k].numel() for k in ctx.ownership.travels)


def mask_update(ctx: RunContext, update: Update, received: State, progress: Progress) -> Update:
    """Pack weight, parameters and statistics of an update into one masked vector.

    Raises:
        UserError: a value does not fit a secure sum.
    """
    assert ctx.privacy is not None
    peers = ctx.sample_clients(progress.round)
    keys, pairs = ctx.ownership.shared_parameters, statistics_pairs(ctx.ownership)
    moved = flatten_entries(update.state, keys) - flatten_entries(received, keys)
    center = {k: v.cpu() for k, v in received.items()}
    trained = {k: v.cpu() for k, v in update.state.items()}
    vector = torch.cat([torch.ones(1).double(), moved, _statistics(ctx, trained, center, pairs)])
    words = encode(vector * ctx.weight(update.examples), ctx.privacy.bits, len(peers))
    words = words + pairwise_mask(update.user, peers, len(words), ctx.run.seed, progress.round)
    return Update(update.user, {MASKED: torch.from_numpy(words.view(np.int64))}, 1, update.loss)


def unmask_mean(ctx: RunContext, updates: Sequence[Update], sent: State, round: int) -> Update:
    """Mean of the clients' updates as one update, from the sum of their masked messages.

    Args:
        ctx: the run's context.
        updates: masked messages of all clients of the round.
        sent: shared entries that the clients received.
        round: the round, from 1.

    Raises:
        UserError: a client's message is missing, so that the masks do not cancel, or the sum of the weights is not
            positive, or the mean is not finite.
    """
    assert ctx.privacy is not None
    if missing := set(ctx.sample_clients(round)) - {u.user for u in updates}:
        raise UserError(
            f"secure sums need every client of a round, but {sorted(missing)} did not reply in round {round}: run "
            "again, or without secure=true"
        )
    vector = decode(modular_sum([u.state[MASKED].numpy().view(np.uint64) for u in updates]), ctx.privacy.bits)
    keys, pairs = ctx.ownership.shared_parameters, statistics_pairs(ctx.ownership)
    size, mean = sum(sent[k].numel() for k in keys), vector[1:] / vector[0]
    center = {k: v.cpu() for k, v in sent.items()}
    state = unflatten_entries(flatten_entries(sent, keys) + mean[:size], sent, keys)
    if pools_moments(ctx.strategy):
        state |= from_sums(mean[size:], center, pairs, 0.0)
    else:
        names = [k for pair in pairs for k in pair]
        state |= unflatten_entries(flatten_entries(center, names) + mean[size:], sent, names)
    if not vector[0] > 0 or not all(torch.isfinite(v).all() for v in state.values()):
        raise UserError(
            f"the secure sum of round {round} is invalid, so a client sent an invalid message, which its mask hides: "
            "run again, or without secure=true to find the client"
        )
    return Update(ALL_CLIENTS, {k: state[k].to(sent[k].device) for k in ctx.ownership.travels}, 1, 0.0)


def _statistics(ctx: RunContext, state: State, center: State, pairs: Sequence[tuple[str, str]]) -> Tensor:
    if pools_moments(ctx.strategy):
        return to_sums(state, center, pairs)
    names = [k for pair in pairs for k in pair]
    return flatten_entries(state, names) - flatten_entries(center, names)


def pools_moments(strategy: NormStrategy) -> bool:
    """Whether a strategy pools clients' moments instead of averaging means and variances."""
    return type(strategy).aggregate_statistics is GlobalPooled.aggregate_statistics


def require_summable(ctx: RunContext) -> None:
    """Raise `UserError` if the strategy's aggregation needs more than sums over the clients."""
    kind = type(ctx.strategy)
    summable = (NormStrategy.aggregate_statistics, GlobalPooled.aggregate_statistics)
    if kind.aggregate_statistics not in summable or kind.group_states is not NormStrategy.group_states:
        raise UserError(
            f"privacy: secure sums hide single clients from the server, but {ctx.run.strategy} needs each client's "
            "update: choose a strategy that averages or pools, such as global-pooled, fedbn or silobn"
        )
    smallest = min(len(ctx.sample_clients(r)) for r in range(1, ctx.run.plan.rounds + 1))
    if smallest < 2:
        raise UserError("privacy: a secure sum of one client reveals its message: sample at least 2 clients per round")
