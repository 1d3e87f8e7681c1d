"""Validation of client replies: entries must have the names, types and shapes of the model.

The declared size of an array is checked before it is decoded, and nothing is ever unpickled.
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

HEADER_BYTES = 4096
"""Maximum bytes of an array besides its values."""

MAX_NOTES_RATIO = 16
"""Maximum size of the notes of a reply, as a multiple of the bytes of the model, plus a megabyte."""


class InvalidReply(UserError):
    """A client's reply that fails validation."""


def expected_entries(ctx: RunContext) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Expected dtype and shape of every entry of a client's reply, by name."""
    if ctx.privacy is not None and ctx.privacy.secure:
        return {MASKED: (torch.int64, (message_size(ctx),))}
    return {k: (ctx.initial[k].dtype, tuple(ctx.initial[k].shape)) for k in ctx.ownership.travels}


def validate_entries(ctx: RunContext, user: int, record: ArrayRecord) -> State:
    """Validate and decode the entries of a client's reply.

    Args:
        ctx: the run's context.
        user: sender of the reply.
        record: received record.

    Raises:
        InvalidReply: names, types, shapes or sizes differ from the model's, or values from another process are not
            finite.
    """
    expected = expected_entries(ctx)
    # Tensors by reference are from this process: values that are not finite are diverged training, which is reported.
    in_process = isinstance(record, LazyArrayRecord) and record.state is not None
    if not in_process:
        if record.keys() != expected.keys():
            raise _unexpected_entries(user, record.keys() ^ expected.keys())
        for name, (dtype, shape) in expected.items():
            max_bytes = dtype.itemsize * torch.Size(shape).numel() + HEADER_BYTES
            if len(record[name].data) > max_bytes:
                raise _invalid_reply(
                    user, f"sent {len(record[name].data)} bytes for {name}, at most {max_bytes} are allowed"
                )
    state = _decode(user, record, ctx.run.device)
    if state.keys() != expected.keys():
        raise _unexpected_entries(user, state.keys() ^ expected.keys())
    for name, (dtype, shape) in expected.items():
        value = state[name]
        if value.dtype != dtype or tuple(value.shape) != shape:
            raise _invalid_reply(
                user, f"sent {name} as {value.dtype} {list(value.shape)}, expected {dtype} {list(shape)}"
            )
        if not in_process and not torch.isfinite(value).all():
            raise _invalid_reply(
                user, f"sent NaN or Inf in {name}: lower the learning rate if other clients diverge too"
            )
    return {name: state[name] for name in expected}


def validate_update(ctx: RunContext, user: int, reply: RecordDict) -> Update:
    """Validate and decode a client's reply to a training round.

    Raises:
        InvalidReply: a record or number is missing or invalid; see also `validate_entries` and `validate_notes`.
    """
    records, metrics, notes = reply.get("arrays"), reply.get("metrics"), reply.get("notes")
    if not isinstance(records, ArrayRecord) or not isinstance(metrics, MetricRecord):
        raise _invalid_reply(user, "sent no arrays or no metrics")
    examples, loss = metrics.get("num-examples"), metrics.get("loss")
    if not isinstance(examples, int) or examples < 1:
        raise _invalid_reply(user, f"reported {examples} training examples")
    if not isinstance(loss, float):
        raise _invalid_reply(user, f"reported the loss {loss}")
    validated = validate_notes(ctx, user, notes) if isinstance(notes, ArrayRecord) else {}
    return Update(user, validate_entries(ctx, user, records), examples, loss, validated)


def validate_moments(user: int, reply: RecordDict) -> dict[str, Moments]:
    """Validate and decode a client's moments in an exchange of statistics.

    Raises:
        InvalidReply: a record is missing or cannot be read, or values are not finite.
    """
    record = reply.get("moments")
    if not isinstance(record, ArrayRecord):
        raise _invalid_reply(user, "sent no moments")
    state = _decode(user, record)
    if invalid := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise _invalid_reply(user, f"sent NaN or Inf in {invalid[0]}")
    return unflatten(state)


def validate_notes(ctx: RunContext, user: int, record: ArrayRecord) -> State:
    """Validate and decode the notes of a client's reply.

    Raises:
        InvalidReply: the notes are much larger than the model or cannot be read.
    """
    if not (isinstance(record, LazyArrayRecord) and record.state is not None):
        num_bytes = sum(len(a.data) for a in record.values())
        max_bytes = MAX_NOTES_RATIO * sum(ctx.ownership.sizes.values()) + 2**20
        if num_bytes > max_bytes:
            raise _invalid_reply(user, f"sent {num_bytes} bytes of notes, at most {max_bytes} are allowed")
    return _decode(user, record, ctx.run.device)


def _decode(user: int, record: ArrayRecord, device: str = "cpu") -> State:
    try:
        return tensors(record, device)
    except UserError as error:
        raise _invalid_reply(user, str(error)) from None


def _unexpected_entries(user: int, names: set[str]) -> InvalidReply:
    listed = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return _invalid_reply(user, f"sent unexpected or missing entries: {listed}")


def _invalid_reply(user: int, what: str) -> InvalidReply:
    return InvalidReply(f"client {user} {what}; its reply was discarded")
