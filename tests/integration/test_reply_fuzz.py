"""Damaged replies of every strategy and personalization method: each is used if valid, or refused in one sentence."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedbn.config import Plan
from fedbn.errors import UserError
from fedbn.federation.metrics import COLUMNS
from fedbn.federation.run import Run
from fedbn.federation.server import global_columns, with_synced_statistics
from fedbn.federation.setup import build_context
from fedbn.personalization.base import personalizations
from fedbn.scenarios.base import scenarios
from fedbn.statistics.consensus import union
from fedbn.strategies.base import strategies
from fedbn_clients.app import app as client_app
from fedbn_clients.records import arrays, tensors
from fedbn_clients.serialization import unpack
from fedbn_simulations.engines.grid import InProcessGrid
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.rounds import Listener, run_rounds
from fedbn_simulations.server.validation import InvalidReply, ReplyValidator
from tests.unequal import Unequal

DEFAULT_REPLIES, SLOW_REPLIES = 40, 150
"""Damaged replies of each treatment by default and under the slow marker."""

QUICK = ["global-robust", "hbn", "fedtan", "fedbn-seeded+scaffold", "fedap"]
TREATMENTS = [*strategies(), *(f"global-pooled+{name}" for name in personalizations()), "fedap+scaffold"]
CONVOLUTIONS = ("fedwon", "instancenorm", "weight-standardization")
SECURE = "global-pooled, secure"
CASES = [
    *((name, DEFAULT_REPLIES) for name in QUICK),
    *(pytest.param(name, SLOW_REPLIES, marks=pytest.mark.slow) for name in [*TREATMENTS, SECURE]),
]
ROUNDS = 2


class Recorded:
    """A short run on the grid: its context, outcome, and copies of one client's replies by message type."""

    def __init__(self, name):
        privacy = "secure=true" if name == SECURE else ""
        plan = Plan(rounds=ROUNDS, batch_size=32, eval_every=ROUNDS, global_test=20)
        model = "small-cnn" if name in CONVOLUTIONS else "mlp"
        run = Run("unequal", name.partition(",")[0], model=model, plan=plan, privacy=privacy).resolved()
        self.ctx, self.replies, last, outcomes = build_context(run), {}, {}, []

        def record(message, context, call_next=client_app):
            reply = call_next(message, context)
            kind, node = message.metadata.message_type, context.node_config["partition-id"]
            packed = RecordDict({k: packed_copy(v) for k, v in reply.content.items()})
            if node == max(self.user, 0):
                self.replies.setdefault(kind, []).append(packed)
            if kind == "train":
                last[node] = packed
            return reply

        self.user = self.ctx.trainers[0]
        app = ClientApp()
        app.__class__ = type("Recorder", (ClientApp,), {"__call__": lambda self, m, c: record(m, c)})
        grid = InProcessGrid(app, len(self.ctx.population.users), {"run": run.to_json()})
        with task_identity(1):
            run_rounds(grid, run, Listener(on_end=outcomes.append))
        (self.outcome,) = outcomes
        self.validator = ReplyValidator(self.ctx)
        self.others = [self.validator.update(u, last[u], {}) for u in self.ctx.trainers[1:]]

    def server(self):
        """A copy of the server, which may be changed."""
        known = self.outcome.server
        return replace(known, known=dict(known.known), client_statistics=dict(known.client_statistics))


def packed_copy(record):
    return arrays(tensors(record)) if isinstance(record, ArrayRecord) else copy.deepcopy(record)


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setitem(scenarios(), Unequal.name, Unequal)
    return lru_cache(Recorded)


NUMBERS = st.sampled_from(
    [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e30, 1e16, 1e15, -1.0, 0.0, 0.5, 1.0, 1e-45, 1e12, 1e13]
)
TYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool])
SCALARS = st.one_of(NUMBERS, st.integers(-3, 10**30 % 2**63), st.just([1.0]), st.just([]))


def value_of(array):
    """Value of an array, or of another one if an earlier change made it unreadable."""
    try:
        return unpack(array)
    except UserError:
        return torch.ones(2)


def write_value(draw, array):
    value = value_of(array)
    flat, number = value.view(-1), draw(NUMBERS)
    if value.dtype == torch.int64:
        flat[...] = draw(st.integers(-(2**63), 2**63 - 1))
    elif draw(st.booleans()):
        flat[draw(st.integers(0, max(len(flat) - 1, 0))) :][:1] = number
    else:
        flat[...] = number
    return arrays({"x": value})["x"]


def change_type(draw, array):
    return arrays({"x": value_of(array).to(draw(TYPES))})["x"]


RESHAPES = [torch.flatten, lambda v: v[None], lambda v: v.new_zeros(0), lambda v: v.flatten()[:1]]


def change_shape(draw, array):
    value = value_of(array)
    return arrays({"x": draw(st.sampled_from(RESHAPES))(value)})["x"]


def enlarge(draw, array):
    return Array(array.dtype, array.shape, array.stype, array.data + bytes(draw(st.sampled_from([1, 100, 100_000]))))


def damage_bytes(draw, array):
    data = bytearray(array.data)
    for _ in range(draw(st.integers(1, 3))):
        data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
    cut = draw(st.integers(0, len(data))) if draw(st.booleans()) else len(data)
    return Array(array.dtype, array.shape, array.stype, bytes(data[:cut]))


def change_header(draw, array):
    shape = draw(st.sampled_from([(), (-1,), (10**12,), (0,), (2, 2)]))
    dtype = draw(st.sampled_from(["float32", "O", "<U3", "float31", ""]))
    return Array(dtype, shape, draw(st.sampled_from(["", array.stype])), array.data)


ARRAY_CHANGES = [write_value, write_value, change_type, change_shape, enlarge, damage_bytes, change_header]


def damage_arrays(draw, record):
    name = draw(st.sampled_from(sorted(record))) if len(record) else None
    kind = draw(st.sampled_from(["change", "change", "change", "drop", "add", "rename"]))
    if kind == "add" or name is None:
        record[draw(st.text(max_size=5))] = arrays({"x": torch.ones(draw(st.integers(0, 3)))})["x"]
    elif kind == "drop":
        del record[name]
    elif kind == "rename":
        record[draw(st.sampled_from([name + "x", "", "|", "moments/x|n", "x|var|mean"]))] = record.pop(name)
    else:
        record[name] = draw(st.sampled_from(ARRAY_CHANGES))(draw, record[name])


def damage_metrics(draw, record):
    name = draw(st.sampled_from(sorted(record)))
    kind = draw(st.sampled_from(["change", "change", "drop", "add"]))
    if kind == "drop":
        del record[name]
    elif kind == "add":
        record[draw(st.sampled_from(["x", "own|x|n", "a|b|c|d", name + "|n"]))] = draw(SCALARS)
    else:
        record[name] = draw(SCALARS)


@st.composite
def damaged(draw, replies):
    """A message type, the position of the reply among those of its type, and the reply after one to three changes."""
    kind = draw(st.sampled_from(sorted(replies)))
    number = draw(st.integers(0, len(replies[kind]) - 1))
    content = RecordDict({k: packed_copy(v) for k, v in replies[kind][number].items()})
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(content))) if len(content) else None
        if name is None or draw(st.integers(0, 19)) == 0:
            other = draw(st.sampled_from([ConfigRecord(), MetricRecord(), ArrayRecord()]))
            content[draw(st.sampled_from(["arrays", "metrics", "notes", "moments"]))] = other
        elif draw(st.integers(0, 19)) == 0:
            del content[name]
        elif isinstance(content[name], ArrayRecord):
            damage_arrays(draw, content[name])
        elif isinstance(content[name], MetricRecord) and len(content[name]):
            damage_metrics(draw, content[name])
    return kind, number, content


def use(recorded, kind, number, content):
    """Validate a reply and use it as the server does. Returns all tensors that the server keeps."""
    ctx, validator, user = recorded.ctx, recorded.validator, recorded.user
    server = recorded.server()
    if kind == "train":
        update = validator.update(user, content, server.state_for(ctx, user))
        assert math.isfinite(update.loss * update.examples)
        server.advance(ctx, [update, *recorded.others], ROUNDS)
        states = [server.state, server.broadcast, server.known, *server.groups.values()]
        return [v for state in [*states, *server.client_statistics.values()] for v in state.values()]
    if kind == "evaluate":
        scores = validator.scores(user, content, COLUMNS, global_columns(ctx, user), cold_starts=False)
        numbers = [x for s in scores for x in (s.n, *s.metrics.values())]
        assert all(0 <= x <= 1 for s in scores for name, x in s.metrics.items() if name != "loss")
        return [torch.tensor(numbers, dtype=torch.float64)]
    statistics, schemas = kind == "query.sync_statistics", validator.schemas
    exchanges = schemas.statistics_exchanges if statistics else schemas.first_batch_exchanges
    position = number % (len(exchanges) + 1)
    moments = validator.moments(user, content, exchanges, position)
    if moments is None:
        return []
    accepted = [v for m in moments.values() for v in (m.n, m.mean, m.m2)]
    if statistics:
        replies = recorded.replies[kind][: len(exchanges)]
        aggregates = [validator.moments(user, reply, exchanges, i) for i, reply in enumerate(replies)]
        aggregates[position] = union([aggregates[position], moments])
        accepted += with_synced_statistics(ctx, server.state, aggregates).values()
    return accepted


def assert_refused(error, recorded):
    text = str(error)
    assert "\n" not in text
    assert len(text) < 400
    if not isinstance(error, InvalidReply):  # a mask hides whose message is invalid
        assert recorded.ctx.privacy.secure
        assert "secure sum of round 2 is invalid" in text
        return
    assert text.startswith("the central trainer " if recorded.user < 0 else f"client {recorded.user} ")
    assert text.endswith("; its reply was discarded")


@pytest.mark.parametrize(("name", "replies"), CASES)
def test_damaged_replies_are_refused_or_valid(name, replies, recorded):
    run = recorded(name)
    counts = {"used": 0, "refused": 0}

    @settings(max_examples=replies, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(damaged({k: v for k, v in run.replies.items() if k != "query.partition"}))
    def body(drawn):
        try:
            accepted = use(run, *drawn)
        except UserError as error:
            assert_refused(error, run)
            counts["refused"] += 1
            return
        counts["used"] += 1
        assert all(torch.isfinite(v).all() for v in accepted if v.is_floating_point())

    body()
    assert counts["used"] + counts["refused"] >= replies
    assert min(counts.values()) > 0
