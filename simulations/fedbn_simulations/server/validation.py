"""Validation of clients' replies against their schemas (`fedbn.federation.schema`), before anything of them is used.

Names and sizes are checked before an array is decoded, and nothing is ever unpickled. Then types, shapes and values are
checked. Tensors that are passed by reference come from simulated clients in this process: their values are not checked,
so that a study can report training that diverged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fedbn.errors import UserError
from fedbn.federation.context import CENTRAL_TRAINER, RunContext
from fedbn.federation.metrics import Column, Score
from fedbn.federation.schema import TRAINING, ReplySchemas
from fedbn.nn.roles import State
from fedbn.nn.schema import NO_LIMITS, Kind, Limits, Schema, check_names, check_tensors, check_values, parameter_norm
from fedbn.statistics.consensus import unflatten
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import StackedUpdates, Update
from fedbn_clients.records import scores_from, tensors
from fedbn_clients.serialization import LazyArrayRecord

HEADER_BYTES = 4096
"""Maximum bytes of an array besides its values."""


class InvalidReply(UserError):
    """A client's reply that fails validation."""


class ReplyValidator:
    """Validates and decodes the replies of a run.

    All methods raise `InvalidReply`, with one sentence that names the client.

    Attributes:
        ctx: the run's context.
        schemas: schemas of the replies.
        limits: limits of plausible messages.
        simulated: whether losses that are not finite are accepted, as reported by simulated clients.
    """

    def __init__(self, ctx: RunContext, limits: Limits = NO_LIMITS, *, simulated: bool = False) -> None:
        self.ctx, self.schemas, self.limits, self.simulated = ctx, ReplySchemas(ctx), limits, simulated

    def update(self, user: int, reply: RecordDict, received: State) -> Update:
        """Reply to a training round.

        Args:
            user: sender of the reply.
            reply: its content.
            received: shared entries that the client received.
        """
        records, metrics, notes = reply.get("arrays"), reply.get("metrics"), reply.get("notes")
        if not isinstance(records, ArrayRecord) or not isinstance(metrics, MetricRecord):
            raise _invalid_reply(user, "sent no arrays or no metrics")
        examples, loss = metrics.get("num-examples"), metrics.get("loss")
        if type(examples) is not int or not self._is_valid(TRAINING["num-examples"], examples, self.limits.examples):
            raise _invalid_reply(user, f"reported {_short(examples)} training examples")
        if type(loss) is not float or not (_is_by_reference(records) or self._is_valid(TRAINING["loss"], loss)):
            raise _invalid_reply(user, f"reported the loss {_short(loss)}")
        if notes is not None and not isinstance(notes, ArrayRecord):
            raise _invalid_reply(user, "sent notes that are no arrays")
        state = self.entries(user, records, received)
        return Update(user, state, examples, loss, {} if notes is None else self.notes(user, notes))

    def stacked_updates(self, updates: StackedUpdates) -> None:
        """Check names, types and shapes of the updates of clients in this process."""
        first, schema = updates[0], self.schemas.entries
        if wrong := check_names(first.state, schema):
            raise _invalid_reply(first.user, f"sent unexpected or missing entries: {_listed(wrong)}")
        if tensor := check_tensors(first.state, schema):
            raise _invalid_reply(first.user, f"sent {tensor}")

    def entries(self, user: int, record: ArrayRecord, received: State) -> State:
        """Shared entries in a reply to a training round."""
        return self._state(user, record, self.schemas.entries, received)

    def notes(self, user: int, record: ArrayRecord) -> State:
        """Notes of the strategy and of the personalization method in a reply to a training round."""
        names, declared = _names(record), {k: spec for schema in self.schemas.notes for k, spec in schema.items()}
        if unknown := names - declared.keys():
            raise _invalid_reply(user, f"sent notes that {self.ctx.run.strategy} does not declare: {_listed(unknown)}")
        # Each plug-in sends all of its notes or none.
        schema = {k: spec for schema in self.schemas.notes if names & schema.keys() for k, spec in schema.items()}
        return self._state(user, record, schema)

    def moments(
        self, user: int, reply: RecordDict, exchanges: Sequence[Schema], number: int
    ) -> dict[str, Moments] | None:
        """Reply to an exchange of moments; None after the last one.

        Args:
            user: sender of the reply.
            reply: its content.
            exchanges: schemas of all exchanges of the synchronization.
            number: position of the exchange among them.
        """
        record = reply.get("moments")
        if not isinstance(record, ArrayRecord):
            raise _invalid_reply(user, "sent no moments")
        is_last = number >= len(exchanges)
        state = self._state(user, record, {} if is_last else exchanges[number])
        return None if is_last else unflatten(state)

    def sums(self, user: int, reply: RecordDict, schema: Schema) -> State:
        """Reply to a round of labeled sums."""
        record = reply.get("sums")
        if not isinstance(record, ArrayRecord):
            raise _invalid_reply(user, "sent no sums")
        return self._state(user, record, schema)

    def scores(
        self, user: int, reply: RecordDict, columns: Sequence[Column], globally: Sequence[Column], *, cold_starts: bool
    ) -> list[Score]:
        """Reply to an evaluation.

        Args:
            user: sender of the reply.
            reply: its content.
            columns: requested columns.
            globally: columns that are also scored on the pooled test rows.
            cold_starts: whether the user received statistics of the clients.
        """
        record = reply.get("metrics")
        if not isinstance(record, MetricRecord):
            raise _invalid_reply(user, "sent no scores")
        required, possible = self.schemas.cells(user, columns, globally, cold_starts=cold_starts)
        names = record.keys()
        cells = {cell for cell in possible if f"{cell[0]}|{cell[1]}|n" in names}
        score, present = self.schemas.score, required | cells
        allowed_names = {f"{row}|{column}|{number}" for row, column in present for number in score}
        needed = {f"{row}|{column}|{number}" for row, column in present for number in ("n", "loss")}
        if wrong := (names - allowed_names) | (needed - names):
            raise _invalid_reply(user, f"sent unexpected or missing scores: {_listed(wrong)}")
        for name, value in record.items():
            number = name.rpartition("|")[2]
            kind = int if number == "n" else float
            allowed = type(value) is kind and (self._is_valid(score[number], value) or self._is_diverged(score[number]))
            if not allowed:
                raise _invalid_reply(user, f"reported {_short(value)} as {name.replace('|', ' ')}")
        return scores_from(record)

    def _is_diverged(self, kind: Kind) -> bool:
        return self.simulated and kind is Kind.VALUE

    def _is_valid(self, kind: Kind, value: float, limit: float = math.inf) -> bool:
        low, high = self.limits.range(kind)
        return low <= value <= min(high, limit)

    def _state(self, user: int, record: ArrayRecord, schema: Schema, received: State | None = None) -> State:
        """Decode a record that has the tensors of a schema."""
        by_reference = _is_by_reference(record)
        if wrong := check_names(_names(record), schema):
            raise _invalid_reply(user, f"sent unexpected or missing entries: {_listed(wrong)}")
        if not by_reference:
            for name, array in record.items():
                if (size := len(array.data)) > (limit := schema[name].num_bytes + HEADER_BYTES):
                    raise _invalid_reply(user, f"sent {size} bytes for {name}, at most {limit} are allowed")
        try:
            state = tensors(record, self.ctx.run.device)
        except UserError as error:
            raise _invalid_reply(user, str(error)) from None
        if tensor := check_tensors(state, schema):
            raise _invalid_reply(user, f"sent {tensor}")
        if not by_reference and (value := check_values(state, schema, self.limits)):
            raise _invalid_reply(user, f"sent {value}: lower the learning rate if other clients diverge too")
        if self.limits.norm < math.inf and (norm := parameter_norm(state, schema, received)) > self.limits.norm:
            what = "gradients" if received is None else "a change of the parameters"
            raise _invalid_reply(user, f"sent {what} of norm {norm:.3g}, at most {self.limits.norm:g} is valid")
        return {name: state[name] for name in schema if name in state}


def _is_by_reference(record: ArrayRecord) -> bool:
    return isinstance(record, LazyArrayRecord) and record.state is not None


def _names(record: ArrayRecord) -> set[str]:
    """Names of the arrays, without converting tensors that are passed by reference."""
    return set(record.state if isinstance(record, LazyArrayRecord) and record.state is not None else record.keys())


def _short(value: object) -> str:
    return text if len(text := repr(value)) <= 40 else f"{text[:40]}..."


def _listed(names: set[str] | Sequence[str]) -> str:
    return ", ".join(_short(n)[1:-1] for n in sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _invalid_reply(user: int, what: str) -> InvalidReply:
    client = "the central trainer" if user == CENTRAL_TRAINER else f"client {user}"
    return InvalidReply(f"{client} {what}; its reply was discarded")
