"""Schemas of all replies that clients send in a run.

*Updates* contain the shared entries, the number of examples, the loss and notes, which strategy and personalization
method declare. *Moments* are exchanged to synchronize statistics; their names are those that the strategy's own
protocol sends for a few rows. *Scores* are cells of the evaluation matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fedbn.data.population import Examples
from fedbn.federation.context import RunContext
from fedbn.federation.metrics import STARTS, Column, Row
from fedbn.federation.protection import MASKED, message_size
from fedbn.nn.roles import statistics_layers
from fedbn.nn.schema import Kind, Schema, TensorSpec, entries_schema, moments_schema
from fedbn.statistics.consensus import Aggregates, replay, run_consensus
from fedbn.statistics.moments import Moments

TRAINING = {"num-examples": Kind.COUNT, "loss": Kind.VALUE}
"""Numbers of an update."""

PROBE_ROWS = 4
"""Number of rows for which the server runs a strategy's protocol to find the names of its messages."""

Cell = tuple[Row, Column]


@dataclass(frozen=True)
class ReplySchemas:
    """Schemas of the replies in a run, computed when they are first needed.

    Attributes:
        ctx: the run's context.

    >>> from fedbn.federation.run import Run
    >>> from fedbn.federation.setup import build_context
    >>> schemas = ReplySchemas(build_context(Run("digits8", "fedap")))
    >>> next(iter(schemas.entries)), [next(iter(notes)) for notes in schemas.notes if notes]
    ('features.0.weight', ['moments/features.1|n'])
    """

    ctx: RunContext

    @cached_property
    def entries(self) -> Schema:
        """Shared entries of an update, or its masked message."""
        ctx = self.ctx
        if ctx.privacy is not None and ctx.privacy.secure:
            return {MASKED: TensorSpec(torch.int64, (message_size(ctx),), Kind.WORD)}
        return entries_schema({k: ctx.initial[k] for k in ctx.ownership.travels}, ctx.ownership.roles)

    @cached_property
    def notes(self) -> tuple[Schema, Schema]:
        """Notes of the strategy and of the personalization method."""
        ctx, rows = self.ctx, self._probe()
        strategy = ctx.strategy.notes_schema(ctx.load(ctx.initial), rows.x)
        return strategy, ctx.personal.notes_schema(ctx.load(ctx.initial), ctx.ownership.roles)

    @cached_property
    def first_batch_exchanges(self) -> list[Schema]:
        """Moments of each exchange of `fedbn.strategies.base.NormStrategy.sync_first_batch`."""
        ctx, rows = self.ctx, self._probe()
        return _exchanges(lambda done: ctx.strategy.sync_first_batch(ctx.load(ctx.initial), rows, done))

    @cached_property
    def statistics_exchanges(self) -> list[Schema]:
        """Moments of each exchange of `fedbn.strategies.base.NormStrategy.sync_statistics`."""
        ctx, rows = self.ctx, self._probe()
        return _exchanges(
            lambda done: replay(lambda: ctx.strategy.sync_statistics(ctx.load(ctx.initial), rows.x), done)
        )

    @cached_property
    def score(self) -> dict[str, Kind]:
        """Numbers of one cell of the evaluation matrix; all but ``n`` and ``loss`` are left out where undefined."""
        task = self.ctx.task
        shares = task.metrics if task.metrics_are_shares else ()
        return {"n": Kind.COUNT, **{name: Kind.SHARE if name in shares else Kind.VALUE for name in task.directions}}

    def cells(
        self, user: int, columns: Sequence[Column], globally: Sequence[Column], *, cold_starts: bool
    ) -> tuple[set[Cell], set[Cell]]:
        """Cells of the evaluation matrix that a user must score, and those that it may score.

        Args:
            user: index of the user.
            columns: requested columns.
            globally: columns that are also scored on the pooled test rows.
            cold_starts: whether the user received statistics of the clients.
        """
        unseen = user in self.ctx.population.unseen
        row: Row = "unseen" if unseen else "own"
        computed = [c for c in columns if c == "aggregated" or self._has_statistics]
        required: set[Cell] = {(row, c) for c in computed} | {("global", c) for c in computed if c in globally}
        return required, required | {(row, c) for c in STARTS if unseen and cold_starts}

    @cached_property
    def _has_statistics(self) -> bool:
        return bool(statistics_layers(self.ctx.scratch))

    def _probe(self) -> Examples:
        data = self.ctx.training_data(self.ctx.trainers[0])
        return data.take(torch.arange(min(PROBE_ROWS, len(data))))


def _exchanges(next_message: Callable[[Aggregates], dict[str, Moments] | None]) -> list[Schema]:
    """Schemas of the messages of a protocol, from a run of it with one client."""
    with torch.random.fork_rng(devices=[]):
        return [
            moments_schema({name: len(moments.mean) for name, moments in message.items()})
            for message in run_consensus(lambda aggregates: [next_message(aggregates)])
        ]
