"""What the server lets in: a client's entries under the names, types and shapes that the model has, and no more.

Nothing is decoded before its declared size has been compared with what is expected, and nothing is ever unpickled.
"""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from clients.records import tensors
from clients.serialization import LazyArrayRecord
from fedbn.errors import UserError
from fedbn.federation.context import RunContext
from fedbn.federation.protection import MASKED, message_size
from fedbn.nn.roles import State
from fedbn.statistics.consensus import unflatten
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import Update

HEADER = 4096
"""Bytes that an array may take besides its values."""

NOTES = 16
"""What a treatment tells besides entries may take this many times the bytes of the model, and a megabyte."""


class InvalidReply(UserError):
    """A client's reply that is not let in."""


def expected(ctx: RunContext) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every entry of a client's reply, by name."""
    if ctx.privacy is not None and ctx.privacy.secure:
        return {MASKED: (torch.int64, (message_size(ctx),))}
    return {k: (ctx.initial[k].dtype, tuple(ctx.initial[k].shape)) for k in ctx.ownership.travels}


def validate_entries(ctx: RunContext, user: int, record: ArrayRecord) -> State:
    """A client's entries.

    Args:
        ctx: the run's context.
        user: who sent them.
        record: as received.

    Raises:
        InvalidReply: other names, types, shapes or sizes than the model's, or, from another process, values that are
            not finite.
    """
    wanted = expected(ctx)
    # Tensors by reference never left this process: what is not finite there is training that diverged, to be shown.
    ours = isinstance(record, LazyArrayRecord) and record.state is not None
    if not ours:
        if record.keys() != wanted.keys():
            raise _bad(user, f"sent entries {_few(record.keys() ^ wanted.keys())} too many or too few")
        for name, (dtype, shape) in wanted.items():
            most = dtype.itemsize * torch.Size(shape).numel() + HEADER
            if len(record[name].data) > most:
                raise _bad(user, f"sent {len(record[name].data)} bytes for {name}, at most {most} are expected")
    try:
        state = tensors(record, ctx.run.device)
    except UserError as error:
        raise _bad(user, str(error)) from None
    if state.keys() != wanted.keys():
        raise _bad(user, f"sent entries {_few(state.keys() ^ wanted.keys())} too many or too few")
    for name, (dtype, shape) in wanted.items():
        value = state[name]
        if value.dtype != dtype or tuple(value.shape) != shape:
            raise _bad(user, f"sent {name} as {value.dtype} {list(value.shape)}, expected {dtype} {list(shape)}")
        if not ours and not torch.isfinite(value).all():
            raise _bad(user, f"sent NaN or Inf in {name}: lower the learning rate if this is not one client's fault")
    return {name: state[name] for name in wanted}


def validate_update(ctx: RunContext, user: int, reply: RecordDict) -> Update:
    """A client's reply to a round of training.

    Raises:
        InvalidReply: a record or number is missing or makes no sense; or as `validate_entries` and `validate_notes`.
    """
    records, metrics, notes = reply.get("arrays"), reply.get("metrics"), reply.get("notes")
    if not isinstance(records, ArrayRecord) or not isinstance(metrics, MetricRecord):
        raise _bad(user, "sent no arrays or no metrics")
    examples, loss = metrics.get("num-examples"), metrics.get("loss")
    if not isinstance(examples, int) or examples < 1:
        raise _bad(user, f"says that it trained on {examples} examples")
    if not isinstance(loss, float):
        raise _bad(user, f"says that its loss is {loss}")
    validated = validate_notes(ctx, user, notes) if isinstance(notes, ArrayRecord) else {}
    return Update(user, validate_entries(ctx, user, records), examples, loss, validated)


def validate_moments(user: int, reply: RecordDict) -> dict[str, Moments]:
    """What a client says in a conversation about statistics.

    Raises:
        InvalidReply: a record is missing or cannot be read, or values are not finite.
    """
    record = reply.get("moments")
    if not isinstance(record, ArrayRecord):
        raise _bad(user, "sent no moments")
    try:
        state = tensors(record)
    except UserError as error:
        raise _bad(user, str(error)) from None
    if wrong := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise _bad(user, f"sent NaN or Inf in {wrong[0]}")
    return unflatten(state)


def validate_notes(ctx: RunContext, user: int, record: ArrayRecord) -> State:
    """What else a client tells.

    Raises:
        InvalidReply: far more than a model's worth of bytes, or something that cannot be read.
    """
    if not (isinstance(record, LazyArrayRecord) and record.state is not None):
        sent, most = sum(len(a.data) for a in record.values()), NOTES * sum(ctx.ownership.sizes.values()) + 2**20
        if sent > most:
            raise _bad(user, f"sent {sent} bytes of notes, at most {most} are taken")
    try:
        return tensors(record, ctx.run.device)
    except UserError as error:
        raise _bad(user, str(error)) from None


def _few(names: set[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (", ..." if len(names) > 3 else "")


def _bad(user: int, what: str) -> InvalidReply:
    return InvalidReply(f"client {user} {what}; nothing of its reply was used")
