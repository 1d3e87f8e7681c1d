"""Labeled sums of seen clients in a federation: what each sends, its protection, and the totals.

After training, the server asks the seen clients for the sums of alignments and matched heads
(`fedbn.online.sums.SumsMethod`) under the served model. Every engine calls the functions of this module.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.federation.context import RunContext
from fedbn.nn.roles import State
from fedbn.nn.schema import Kind, Schema, TensorSpec
from fedbn.online.alignments.base import alignments
from fedbn.online.matched import Matched
from fedbn.online.sums import LabeledWindows, SumsMethod, add_sums, exchange_sums
from fedbn.plugins import parse, render
from fedbn.privacy.accounting import epsilon
from fedbn.privacy.mechanism import clip_norm, flatten_entries, unflatten_entries
from fedbn.privacy.secure_aggregation import decode, encode, modular_sum, pairwise_mask
from fedbn.seeds import generator

MASKED = "masked"
"""Name of the only tensor of a masked message."""

PROBE_ROWS = 4
"""Number of rows for which the server computes sums to find their names and shapes."""


def parse_sums_method(text: str) -> SumsMethod:
    """Alignment or matched head from a text such as ``rotation:b=16`` or ``matched``.

    Raises:
        UserError: unknown name or option (the closest one is suggested), or a value out of range.
    """
    known: dict[str, type[SumsMethod]] = {**alignments(), Matched.name: Matched}
    return parse(text, "alignment or head", known, (SumsMethod,))


def client_sums(
    ctx: RunContext, user: int, model: nn.Module, method: SumsMethod, number: int, received: State
) -> State:
    """The message of a client in a round of sums, with the run's privacy protection.

    Args:
        ctx: the run's context.
        user: index of the seen user.
        model: the served model.
        method: alignment or head.
        number: number of the round, from 0.
        received: result of the round before; empty in the first.

    Raises:
        UserError: the model or the data do not fit the method, or a value does not fit a secure sum.
    """
    privacy = ctx.privacy
    try:
        sums = method.client_sums(model.eval(), _windows(ctx, user), received)
    except UserError as error:
        if privacy is None or not privacy.noise or not number:
            raise
        raise UserError(f"{error}. Or the noise on the sums of the rounds before is too large: lower it") from error
    if privacy is None:
        return sums
    if privacy.is_bounded:
        windows = sums["n"].sum().clamp_min(1)
        sums = {k: v / windows if k in method.window_sums else v for k, v in sums.items()}
        vector = clip_norm(flatten_entries(sums, list(sums)), privacy.statistics_bound)
        if privacy.noise:
            draw = generator(ctx.run.seed, "privacy", "sums", render(method), number, user)
            if privacy.entropy == "system":
                draw.manual_seed(secrets.randbits(63))
            scale = privacy.noise * privacy.statistics_bound
            vector = vector + scale * torch.randn(len(vector), dtype=torch.float64, generator=draw)
        sums = unflatten_entries(vector, sums, list(sums))
    if not privacy.secure:
        return sums
    peers = ctx.population.seen
    words = encode(flatten_entries(sums, list(sums)), privacy.bits, len(peers))
    words = words + pairwise_mask(user, peers, len(words), ctx.run.seed, f"{render(method)}/{number}")
    return {MASKED: torch.from_numpy(words.view(np.int64))}


def total_of(ctx: RunContext, method: SumsMethod, messages: Sequence[State]) -> State:
    """Sums over all clients from their messages, which can be masked.

    Raises:
        UserError: the message of a client is missing, so that masks do not cancel.
    """
    if ctx.privacy is None or not ctx.privacy.secure:
        return add_sums(messages)
    if len(messages) < len(ctx.population.seen):
        raise UserError("secure sums need every seen client, and some did not reply: run again, or without secure=true")
    like = _example(ctx, method)
    vector = decode(modular_sum([m[MASKED].numpy().view(np.uint64) for m in messages]), ctx.privacy.bits)
    return unflatten_entries(vector, like, list(like))


def sums_schema(ctx: RunContext, method: SumsMethod) -> Schema:
    """Schema of a client's message."""
    like, privacy = _example(ctx, method), ctx.privacy
    if privacy is not None and privacy.secure:
        return {MASKED: TensorSpec(torch.int64, (sum(v.numel() for v in like.values()),), Kind.WORD)}
    counts = () if privacy is not None and privacy.noise else ("n", "clients", "square", "total")
    kinds = dict.fromkeys(counts, Kind.NONNEGATIVE)
    return {k: TensorSpec(v.dtype, tuple(v.shape), kinds.get(k, Kind.VALUE)) for k, v in like.items()}


def sums_of_clients(ctx: RunContext, model: nn.Module, method: SumsMethod) -> State:
    """The result of all rounds of a method, computed in this process.

    Raises:
        UserError: as `client_sums`.
    """

    def exchange(number: int, received: State) -> State:
        messages = [client_sums(ctx, user, model, method, number, received) for user in ctx.population.seen]
        return total_of(ctx, method, messages)

    return exchange_sums(method, exchange)


def collect_sums(
    ctx: RunContext, texts: Sequence[str], send: Callable[[SumsMethod, int, State], list[State]]
) -> dict[str, State]:
    """Results of several methods by text.

    Args:
        ctx: the run's context.
        texts: the methods.
        send: sends the result of the round before to all seen clients, and returns their messages.

    Raises:
        UserError: a method does not fit the model or the task.
    """
    require_sums(ctx, texts)
    found = {}
    for text in texts:
        method = parse_sums_method(text)
        _example(ctx, method)  # refuses models that do not fit before a message is sent
        found[text] = exchange_sums(method, lambda n, got, m=method: total_of(ctx, m, send(m, n, got)))  # type: ignore[misc]
    return found


def require_sums(ctx: RunContext, texts: Sequence[str]) -> None:
    """Check that the methods fit a run.

    Raises:
        UserError: an unknown method, or a task without classes.
    """
    for text in texts:
        method = parse_sums_method(text)
        if not ctx.task.has_posterior:
            raise UserError(f"{method.name!r} needs classes, and task {ctx.task.name!r} has none: leave it out of sums")


def sums_notice(ctx: RunContext, methods: Sequence[SumsMethod]) -> str:
    """What the run's privacy protection guarantees for the labeled sums; empty without noise.

    Raises:
        UserError: the accountant is missing.
    """
    privacy, releases = ctx.privacy, sum(m.sum_rounds for m in methods)
    if privacy is None or not privacy.noise or not releases:
        return ""
    spent = epsilon(privacy.noise / 2, releases, privacy.delta)
    return (
        f"privacy of the labeled sums: user-level, epsilon = {spent:.3g} at delta = {privacy.delta:g} for "
        f"{releases} releases per user, in addition to that of training"
    )


def _windows(ctx: RunContext, user: int, rows: int | None = None) -> LabeledWindows:
    data, population = ctx.population.users[user].train, ctx.population
    return LabeledWindows(data.x[:rows], data.y[:rows], len(population.classes), population.triples)


def _example(ctx: RunContext, method: SumsMethod) -> State:
    """Sums of a few rows, for their names and shapes, which do not depend on the model's weights."""
    return method.client_sums(ctx.scratch.eval(), _windows(ctx, ctx.population.seen[0], PROBE_ROWS), {})
